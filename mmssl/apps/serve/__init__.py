"""A web page and a JSON API over a model and, if there is one, an index of images.

```python
import mmssl
from mmssl.apps.search import Index
from mmssl.apps.serve import create_app

app = create_app(mmssl.load("runs/quickstart"), Index("index"))  # a FastAPI application
```
"""

from mmssl.apps.serve.app import create_app
from mmssl.apps.serve.limits import ServerLimits

__all__ = ["ServerLimits", "create_app"]
