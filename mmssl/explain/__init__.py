"""Why a model finds a picture and a caption alike: maps over the picture, scores of the words, and the training pairs
nearest to them.

```python
import mmssl
from mmssl.explain import explain

found = explain(mmssl.load("runs/quickstart"), "apple.png", "a red apple")
found.heat, found.words
```
"""

from mmssl.explain.explanation import Explanation, explain
from mmssl.explain.maps import DEFAULT, METHODS, image_maps
from mmssl.explain.neighbours import Neighbour, nearest
from mmssl.explain.words import word_scores

__all__ = [
    "DEFAULT",
    "METHODS",
    "Explanation",
    "Neighbour",
    "explain",
    "image_maps",
    "nearest",
    "word_scores",
]
