"""Metrics and health over HTTP: ``/metrics``, ``/healthz`` and ``/readyz``. Spec: docs/monitoring.md."""

from __future__ import annotations

from ipaddress import ip_address

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from harp_daemon.exposition import OPENMETRICS, TEXT, accepts_openmetrics
from harpcaller.access import AuthError, Refusal
from harpcaller.access.client import Client
from harpcaller.access.policy import Action
from harpcaller.http.authentication import authenticate
from harpcaller.http.operations import json_response
from harpcaller.http.service import HTTPService


class MonitoringRoutes:
    """The routes of one HTTP API."""

    def __init__(self, service: HTTPService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes, relative to the base path."""
        return [
            Route("/healthz", self._send_health),
            Route("/readyz", self._send_readiness),
            Route("/metrics", self._send_metrics),
        ]

    async def _send_health(self, request: Request) -> Response:
        """Answer while the event loop turns: without the store, and without a lock."""
        request.state.route = "/healthz"
        return json_response({"status": "ok"})

    async def _send_readiness(self, request: Request) -> Response:
        request.state.route = "/readyz"
        checks = await self._service.health.check()
        if all(check.ok for check in checks):
            return json_response({"ready": True})
        has_details = await self._may_see_details(request)
        shown = [
            {"name": check.name, "ok": check.ok, **({"detail": check.detail} if has_details else {})}
            for check in checks
        ]
        return json_response({"ready": False, "checks": shown}, 503)

    async def _may_see_details(self, request: Request) -> bool:
        try:
            await self._require(request)
        except AuthError:
            if "authorization" in request.headers:
                raise  # after the delay of a wrong token
            return False
        except Refusal:
            return False
        return True

    async def _send_metrics(self, request: Request) -> Response:
        request.state.route = "/metrics"
        await self._require(request)
        openmetrics = accepts_openmetrics(request.headers.get("accept", ""))
        text = await self._service.monitor.scrape(openmetrics)
        return Response(text, headers={"Content-Type": OPENMETRICS if openmetrics else TEXT})

    async def _require(self, request: Request) -> None:
        """Check the right to see metrics. Raises `AuthError` and `AccessDenied`."""
        try:
            client = (await authenticate(request, self._service)).client
        except AuthError:
            if "authorization" in request.headers or not self._may_be_anonymous(request.state.client):
                raise
            return
        if not self._may_be_anonymous(client):
            self._service.acting_as(client).require(Action.METRICS)

    def _may_be_anonymous(self, client: Client) -> bool:
        settings = self._service.settings
        if settings.metrics_anonymous != "local":
            return settings.metrics_anonymous == "all"
        return not settings.behind_proxy and _is_local(client)


def _is_local(client: Client) -> bool:
    """Return whether a client is on this machine."""
    if client.listener.startswith("unix:"):
        return True
    host = client.peer.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
