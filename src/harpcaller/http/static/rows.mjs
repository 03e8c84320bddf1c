// What several views show of a job or of the hosts registry.
import { visible } from "./ui.mjs";

/** Return "backup("orders")": the procedure and the start of its arguments, as they were sent. */
export function callOf(row) {
  let args = row.arguments_preview ?? "";
  const cut = args.length >= 200;
  if (args.startsWith("[")) args = args.slice(1, args.endsWith("]") && !cut ? -1 : undefined);
  return [visible(row.procedure), "(" + visible(args === "null" ? "" : args) + (cut ? "…" : "") + ")"];
}

/** Return the sources of the hosts registry: [{name, source, hosts, age, error, rejected_lines}]. */
export const sourcesOf = (registry) => Object.entries(registry || {}).filter(([, source]) => source && typeof source === "object").map(([name, source]) => ({ name, ...source }));
