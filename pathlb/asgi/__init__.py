"""pathlb in ASGI apps: `Gateway`, a balancing reverse proxy; `BalancerMiddleware` and `lifespan`, balancers for an
app's own handlers; `LoadReport`, for services behind a balancer.
"""

from .gateway import Gateway
from .load_report import LoadReport
from .middleware import BalancerMiddleware, lifespan
from .routes import Route

__all__ = ["BalancerMiddleware", "Gateway", "LoadReport", "Route", "lifespan"]
