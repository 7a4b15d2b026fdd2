"""What the routes are known by before a request is routed: in metrics, and whether it is read."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Scope

UNMATCHED = "unmatched"


class RouteTable:
    """The app's own routes; there are a dozen."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, APIRoute)]

    def template(self, scope: Scope) -> str:
        """Path of the route that a request is for, whatever its method."""
        return next((route.path for route in self._matching(scope)), UNMATCHED)

    def methods(self, scope: Scope) -> list[str]:
        """That the path of a request takes, by whichever routes."""
        return sorted({method for route in self._matching(scope) for method in route.methods or ()})

    def takes_body(self, scope: Scope) -> bool:
        """Whether anything will read the body of a request."""
        return any(
            route.body_field is not None and scope["method"] in (route.methods or ())
            for route in self._matching(scope)
        )

    def _matching(self, scope: Scope) -> Iterable[APIRoute]:
        return (route for route in self._routes if route.path_regex.match(scope["path"]))


def routes_of(request: Request) -> RouteTable:
    routes: RouteTable = request.app.state.routes
    return routes
