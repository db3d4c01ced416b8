"use strict";
// Everything that comes from a model or a user is put in as text, never as markup.
const at = (id) => document.getElementById(id);
const talk = [];
let stopper = null;

function headers() {
  const key = at("key").value.trim();
  const told = { "content-type": "application/json" };
  return key ? { ...told, authorization: `Bearer ${key}` } : told;
}

function line(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  at("talk").append(item);
  return item;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let held = "";
  for (const reader = response.body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const item = line("assistant", "");
  const begun = performance.now();
  let first = 0, usage = null, text = "";
  stopper = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: stopper.signal,
      body: JSON.stringify({ messages: talk, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const piece = event.choices[0]?.delta?.content;
      if (piece) {
        first = first || performance.now();
        text += piece;
        item.textContent = text;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") line("failed", error.message);
  }
  talk.push({ role: "assistant", content: text });
  if (usage && first) {
    const rate = (usage.completion_tokens - 1) / ((performance.now() - first) / 1000);
    at("speed").textContent = `${usage.completion_tokens} tokens, first after ${Math.round(first - begun)} ms` +
      (usage.completion_tokens > 1 ? `, then ${rate.toFixed(1)} tokens/s` : "");
  }
  stopper = null;
  at("send").hidden = false;
  at("stop").hidden = true;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = at("said").value.trim();
  if (!said || stopper) return;
  at("said").value = "";
  talk.push({ role: "user", content: said });
  line("user", said);
  answer();
});
at("said").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => stopper?.abort());
at("clear").addEventListener("click", () => {
  stopper?.abort();
  talk.length = 0;
  at("talk").replaceChildren();
  at("speed").textContent = "";
});

function cells(row, values) {
  for (const value of values) {
    const cell = document.createElement("td");
    cell.textContent = value;
    row.append(cell);
  }
}

async function plan() {
  const response = await fetch("plan", { headers: headers() });
  if (!response.ok) return;
  const told = await response.json();
  at("model").textContent = told.model;
  at("layout").textContent = told.layout;
  at("reasons").replaceChildren(...told.reasons.map((reason) => {
    const item = document.createElement("li");
    item.textContent = reason;
    return item;
  }));
  const rows = (told.plan?.candidates ?? []).map((candidate) => {
    const row = document.createElement("tr");
    row.className = candidate.layout === told.layout ? "chosen" : "";
    const made = candidate.predicted;
    if (made) {
      const figures = [made.ttft_ms, made.tpot_ms, made.output_tokens_per_s, made.memory_gb_per_gpu];
      cells(row, [candidate.layout, ...figures.map((figure) => figure.toPrecision(3))]);
    } else {
      cells(row, [candidate.layout, candidate.reason]);
      row.lastChild.colSpan = 4;
      row.lastChild.className = "reason";
    }
    return row;
  });
  at("candidates").tBodies[0].replaceChildren(...rows);
}

let last = null;
async function live() {
  try {
    const told = await (await fetch("stats")).json();
    if (last) {
      const rate = (told.generated_tokens - last.generated_tokens) / (told.time_s - last.time_s);
      at("rate").textContent = rate.toFixed(rate < 10 ? 1 : 0);
    }
    at("running").textContent = told.running;
    at("waiting").textContent = told.waiting;
    last = told;
  } catch {
    at("rate").textContent = "no answer";
    last = null;
  }
  setTimeout(live, 1000);
}

at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  plan();
});
plan();
live();
