"""A web page and a JSON API over a model and, if there is one, an index of pictures.

```python
import mmssl
from mmssl.search import Index
from mmssl.serve import create_app

app = create_app(mmssl.load("runs/quickstart"), Index("index"))  # a FastAPI application
```
"""

from mmssl.serve.app import create_app
from mmssl.serve.limits import Limits

__all__ = ["Limits", "create_app"]
