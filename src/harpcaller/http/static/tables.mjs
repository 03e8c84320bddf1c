// What the views with plain tables share: asking, asking again, and their heads.
import { get, watchRequests } from "./api.mjs";
import { useEffect, useRef, useState } from "./ui.mjs";

const AGAIN_AFTER = 2_000;

/**
 * Ask `path` with `params` and return {data, error, ask, soon, more}. `field` names the list in the answer; `more`
 * appends the next page. `soon` asks again, at most every two seconds.
 */
export function useAnswer(path, params, field) {
  const [state, setState] = useState({ data: null, error: null });
  const key = path + "?" + new URLSearchParams(Object.entries(params || {}).filter(([, value]) => value));
  const now = useRef({ key, timer: 0, at: 0, pages: 1 }).current;
  async function ask() {
    now.timer = 0;
    now.at = Date.now();
    const mine = now.key;
    try {
      let data = await get(path, params);
      for (let page = 1; page < now.pages && data.next; page++) data = joined(data, await get(path, { ...params, cursor: data.next }));
      if (now.key === mine) setState({ data, error: null });
    } catch (error) {
      if (now.key === mine) setState((before) => ({ data: before.data, error }));
    }
  }
  const joined = (first, second) => ({ ...second, [field]: [...first[field], ...second[field]] });
  const soon = () => now.timer || (now.timer = setTimeout(ask, Math.max(0, now.at + AGAIN_AFTER - Date.now())));
  useEffect(() => {
    Object.assign(now, { key, pages: 1 });
    setState({ data: null, error: null });
    ask();
    return () => {
      clearTimeout(now.timer);
      now.timer = 0;
      now.key = null;
    };
  }, [key]);
  // An answer that the dispatcher did not give is asked for again when it is back.
  const latest = useRef(null);
  latest.current = () => state.error && ask();
  useEffect(() => watchRequests(({ back }) => back && latest.current()), []);
  async function more() {
    try {
      const second = await get(path, { ...params, cursor: state.data.next });
      now.pages++;
      setState({ data: joined(state.data, second), error: null });
    } catch (error) {
      setState({ data: state.data, error });
    }
  }
  return { ...state, ask, soon, more };
}

/** Call `action` every 10 s while the tab is seen: hosts change without a change of any job. */
export function useRepeat(action) {
  const latest = useRef(action);
  latest.current = action;
  useEffect(() => {
    const timer = setInterval(() => document.hidden || latest.current(), 10_000);
    return () => clearInterval(timer);
  }, []);
}
