"""A TCP proxy in front of a server of 127.0.0.1 that cuts streams at random bytes, as a bad network does."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CHUNK = 1 << 16


class CuttingProxy:
    """The proxy. A connection is cut some bytes after a request that contains `pattern`.

    Args:
        target: the port of the server.
        pattern: bytes of the requests whose responses are cut.
        cuts: how many are cut; the others pass.
        longest: the greatest number of bytes until a cut.
        least: the least number of bytes until a cut.
        seed: for the random numbers of bytes.

    Attributes:
        port: the port on which it listens.
        cuts: how many responses it has cut.
    """

    def __init__(self, target: int, pattern: bytes, cuts: int, longest: int, least: int, seed: str) -> None:
        self.port = 0
        self.cuts = 0
        self._target, self._pattern, self._most, self._range = target, pattern, cuts, (least, longest)
        self._random = random.Random(seed)

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._pass(reader, writer)
            except asyncio.CancelledError:
                pass  # the proxy ends; the server of asyncio would report it
            finally:
                tasks.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(far_writer)
            left: list[int] = []  # bytes until the connection is cut
            there = asyncio.create_task(self._send(reader, far_writer, left))
            back = asyncio.create_task(self._receive(far_reader, writer, left))
            try:
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        except OSError:
            pass  # the server was killed
        finally:
            for each in writers:
                each.close()
                with suppress(OSError):
                    await each.wait_closed()

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]) -> None:
        while data := await reader.read(_CHUNK):
            is_cut = self._pattern in data and self.cuts < self._most
            left[:] = [self._random.randrange(*self._range)] if is_cut else []
            writer.write(data)
            await writer.drain()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]) -> None:
        while data := await reader.read(_CHUNK):
            if left:
                data = data[: left[0]]
                left[0] -= len(data)
            writer.write(data)
            await writer.drain()
            if left and not left[0]:
                self.cuts += 1
                return


@contextmanager
def cutting(
    target: int, pattern: bytes, cuts: int, longest: int, least: int = 1, seed: str = "1"
) -> Iterator[CuttingProxy]:
    """Run a proxy in a thread."""
    proxy = CuttingProxy(target, pattern, cuts, longest, least, seed)
    ready = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop.append((asyncio.get_running_loop(), asyncio.Event()))
        await proxy.serve(ready, stop[0][1])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(30.0)
        yield proxy
    finally:
        loop, event = stop[0]
        loop.call_soon_threadsafe(event.set)
        thread.join()
