"""A web page and a JSON API over a model and, if there is one, an index of pictures.

```python
import mmssl
from mmssl.apps.search import Index
from mmssl.apps.serve import create_app

app = create_app(mmssl.load("runs/quickstart"), Index("index"))  # a FastAPI application
```
"""

from mmssl.apps.serve.app import create_app
from mmssl.apps.serve.limits import Limits

__all__ = ["Limits", "create_app"]
