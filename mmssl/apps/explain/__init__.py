"""Why a model finds an image and a caption alike: maps over the image, scores of the words, and the training pairs
nearest to them.

```python
import mmssl
from mmssl.apps.explain import explain

found = explain(mmssl.load("runs/quickstart"), "apple.png", "a red apple")
found.heat, found.words
```
"""

from mmssl.apps.explain.explanation import Explanation, explain
from mmssl.apps.explain.maps import DEFAULT, METHODS, image_maps
from mmssl.apps.explain.neighbours import Neighbour, nearest
from mmssl.apps.explain.word_scores import word_scores

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
