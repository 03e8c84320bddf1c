"""The asyncio client, wrapped to behave like the synchronous one, so that one test can use both."""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import TracebackType
from typing import Any

#: Seconds after which a step fails.
DEADLINE = 60.0


class LoopThread:
    """An event loop in a thread; a context manager that starts it, stops it, and asserts that all tasks have ended."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self.run(_tasks())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE)
        self.loop.close()
        if kind is None:
            assert not left, f"tasks are left: {left}"


async def _tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


class Blocking:
    """An object of `harp.aio`; its methods wait for their coroutines."""

    def __init__(self, target: Any, thread: LoopThread) -> None:
        self._target = target
        self._thread = thread

    def _wrapped(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            value = self._thread.run(value)
        is_client = type(value).__module__ in ("harp.aio", "harp._net.aio") or inspect.ismethod(value)
        return Blocking(value, self._thread) if is_client else value

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._target, name))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._target(*args, **kwargs))

    def __iter__(self) -> Blocking:
        return self

    def __next__(self) -> Any:
        try:
            return self._thread.run(self._target.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Blocking:
        self._wrapped(self._target.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._wrapped(self._target.__aexit__(*error))

    def __str__(self) -> str:
        return str(self._target)

    def __repr__(self) -> str:
        return repr(self._target)
