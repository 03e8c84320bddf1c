// A browser opens six connections to one address over HTTP/1.1, for all tabs together: a seventh stream would hang
// without an error. So tabs hold a lock for each stream, at most four; a tab that gets none asks every 5 s.

/** Hold one of the locks until `signal` is aborted; return whether one was free. */
export async function takeSlot(signal) {
  // With HTTP/2 one connection carries all streams.
  if (!navigator.locks || performance.getEntriesByType("navigation")[0]?.nextHopProtocol === "h2") return true;
  for (let number = 1; number <= 4 && !signal.aborted; number++) {
    const isTaken = await new Promise((resolve) => {
      navigator.locks.request("harp-stream-" + number, { ifAvailable: true }, (lock) => {
        resolve(Boolean(lock));
        return lock && new Promise((release) => (signal.aborted ? release() : signal.addEventListener("abort", release, { once: true })));
      }).catch(() => resolve(false));
    });
    if (isTaken) return true;
  }
  return false;
}

/** Wait some milliseconds, or until `signal` is aborted. */
export const sleep = (time, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, time);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
