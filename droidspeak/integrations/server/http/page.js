// Brings the figures up to date. What was opened stays open, and nothing moves while somebody works with a table.
"use strict"
const PERIOD = 5000

async function refresh() {
  const main = document.querySelector("main")
  if (document.hidden || main.contains(document.activeElement) || String(getSelection())) return
  try {
    const answer = await fetch(location.href, { cache: "no-store" })
    if (!answer.ok) throw new Error(answer.status)
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main")
    for (const part of main.querySelectorAll("details[open][id]")) {
      const same = fresh.querySelector("#" + part.id)
      if (same) same.open = true
    }
    main.replaceWith(fresh)
  } catch {
    // The daemon may be starting again: the last figures stay, and say that they are old.
    document.querySelector("#now").textContent = "The daemon does not answer; these figures are old."
  }
}

setInterval(refresh, PERIOD)
