// The page's behaviour; http_app.py puts this file into chat.html.
"use strict";
const WORDS = {                              // [English, Chinese]
  new: ["New conversation", "新对话"], untitled: ["New", "新对话"], clear: ["Clear", "清空"],
  gear: ["Settings", "设置"], language: ["中文", "English"], burger: ["Conversations", "对话列表"],
  send: ["Send", "发送"], stop: ["Stop", "停止"], retry: ["Retry", "重试"], edit: ["Edit", "编辑"],
  copy: ["Copy", "复制"], copied: ["Copied", "已复制"], cancel: ["Cancel", "取消"],
  drop: ["Delete", "删除"], sure: ["Delete this conversation?", "删除这个对话？"],
  ask: ["Ask something", "问点什么"], hello: ["What would you like to know?", "想聊点什么？"],
  hint: ["Enter sends, Shift+Enter starts a new line. Small models make things up.",
    "回车发送，Shift+回车换行。小模型会编造内容。"],
  system: ["System prompt", "系统提示词"], temperature: ["Temperature", "温度"],
  top_k: ["Top-k", "Top-k"], seed: ["Seed", "随机种子"], random: ["random", "随机"],
  max_tokens: ["Max tokens", "最多生成 token 数"], key: ["API key:", "API 密钥："],
  context: ["Tokens of the context in use", "已用上下文（token 数）"],
  forgotten: ["The model no longer sees this message.", "模型已看不到这条消息。"],
  lost: ["The connection broke.", "连接中断了。"],
  full: ["The browser's storage is full: nothing more is kept.", "浏览器存储已满，无法继续保存。"],
};
const SAMPLES = ["你好", "你能做什么？", "写一句关于春天的话"];
const OPTIONS = ["temperature", "top_k", "seed", "max_tokens"];
const $ = id => document.getElementById(id);
const t = word => WORDS[word][state.lang === "zh" ? 1 : 0];

// ---- what is kept: under "mini-llm" the state, under "mini-llm/" + id each conversation, so that
// two tabs never write over each other's
const state = { id: "", current: "", lang: navigator.language.startsWith("zh") ? "zh" : "en",
  options: {}, key: "" };
let chats = [], made = 0;                    // the newest first: an id begins with its time
const unsaved = new Set();                   // what did not fit into the storage
const runs = new Map();                      // conversation → what is under way for it
let card = { max_model_len: 0, defaults: {} };

function newId() {
  const time = (Date.now() * 1000 + made++).toString(36);
  return `/${time}-${Math.random().toString(36).slice(2)}`;
}
function newChat() { return { id: newId(), messages: [], system: "", used: 0 }; }
function add(one) { chats = [...chats, one].sort((a, b) => (a.id < b.id ? 1 : -1)); }
function chat() {
  if (!chats.length) add(newChat());
  const here = chats.find(one => one.id === state.current) || chats[0];
  state.current = here.id;
  return here;
}
function parse(text) { try { return JSON.parse(text); } catch { return null; } }
function restore() {
  try {
    Object.assign(state, parse(localStorage["mini-llm"]), { id: "" });
    for (const key of Object.keys(localStorage)) {
      const one = key.startsWith("mini-llm/") && parse(localStorage[key]);
      if (one?.messages) add(one);
    }
    const { chats: old } = state;            // an earlier version kept all in one place
    delete state.chats;
    old?.reverse().forEach(one => add({ ...one, id: newId() }));
    if (old) save(state, ...chats);
  } catch { }                                // a browser that keeps nothing
}
function save(...changed) {
  for (const one of new Set([...unsaved, ...changed])) {
    try { localStorage.setItem("mini-llm" + one.id, JSON.stringify(one)); unsaved.delete(one); }
    catch { unsaved.add(one); }
  }
  $("hint").textContent = t(unsaved.size ? "full" : "hint");
}
function drop(one) {
  runs.get(one)?.abort.abort();
  unsaved.delete(one);
  chats = chats.filter(other => other !== one);
}
function follow({ key, newValue }) {         // another tab has saved or deleted this
  const here = chat(), value = parse(newValue);
  const known = chats.find(one => "mini-llm" + one.id === key);
  if (key === "mini-llm") Object.assign(state, value, { current: here.id });
  else if (known && !value) drop(known);
  else if (known && !runs.has(known)) Object.assign(known, value);
  else if (value?.messages) {
    if (known) known.id = newId();           // both tabs asked something: keep both
    if (known === here) state.current = known.id;
    add(value);
  }
  if (known === here || !document.querySelector(".edit")) draw();
  else drawChats();
}

// ---- the network
async function call(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = "Bearer " + state.key;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) {
    const key = prompt(t("key"), "");
    if (key) { state.key = key; save(state); return call(path, options); }
  }
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message || `HTTP ${response.status}`);
}
async function* events(response) {
  let text = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(t("lost"));
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}
async function answer(one, tries) {
  const sent = one.messages.filter(message => message.content);
  const body = { messages: sent.map(({ role, content }) => ({ role, content })), stream: true,
    stream_options: { include_usage: true } };
  if (one.system) body.messages.unshift({ role: "system", content: one.system });
  for (const name of OPTIONS)
    if (state.options[name] !== undefined) body[name] = state.options[name];
  if (body.seed !== undefined) body.seed += tries;           // a retry is another draw
  const reply = { role: "assistant", content: "", note: "" };
  const run = { reply, abort: new AbortController(), node: null };
  runs.set(one, run);
  one.messages.push(reply);
  one.tries = tries;
  draw();
  const began = performance.now();
  try {
    const options = { method: "POST", body: JSON.stringify(body), signal: run.abort.signal };
    for await (const event of events(await call("v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        const made = event.usage.completion_tokens, seconds = (performance.now() - began) / 1000;
        reply.note += ` · ${made} tokens`;
        if (seconds > 1) reply.note += ` · ${Math.round(made / seconds)} tokens/s`;
        one.used = event.usage.total_tokens;
      }
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) grow(run, choice.delta.content);
      if (choice.finish_reason) {
        reply.note = `seed ${choice.seed}`;
        sent.forEach((message, i) => message.forgotten = i < choice.forgotten_messages);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError")
      reply.error = error.name === "TypeError" ? t("lost") : error.message;
  }
  runs.delete(one);
  if (!reply.content && !reply.error && !reply.note) one.messages.pop();
  if (chats.includes(one)) save(one);
  if (one === chat()) draw();                // elsewhere somebody may be editing
}
function grow(run, text) {
  const stays = atEnd();
  run.reply.content += text;
  run.node.appendData(text);
  if (stays) toEnd();
}
function say(text, index = chat().messages.length, tries = 0) {      // in place of message `index`
  const here = chat();
  if (!text.trim() || runs.has(here)) return;
  here.messages.length = index;
  here.messages.push({ role: "user", content: text });
  save(here, state);
  answer(here, tries);
  toEnd();
}

// ---- the screen; text only ever goes into text nodes
function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function atEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 40;
}
function toEnd() { $("scroll").scrollTop = $("scroll").scrollHeight; }
function draw() {
  const here = chat(), run = runs.get(here), stays = atEnd();
  document.documentElement.lang = state.lang;
  for (const id of ["new", "clear", "gear", "language"]) $(id).textContent = t(id);
  for (const id of ["system", ...OPTIONS]) {
    $(id).previousElementSibling.textContent = t(id);
    const usual = { ...card.defaults, max_tokens: card.defaults.max_new_tokens, seed: t("random") };
    $(id).placeholder = usual[id] ?? "";
    const value = id === "system" ? here.system : state.options[id];
    if (document.activeElement !== $(id)) $(id).value = value ?? "";
  }
  $("input").placeholder = $("input").ariaLabel = t("ask");
  $("hint").textContent = t(unsaved.size ? "full" : "hint");
  $("burger").ariaLabel = t("burger");
  $("context").title = t("context");
  $("model").textContent = card.id || "mini-llm";
  $("used").textContent = card.max_model_len ? `${here.used} / ${card.max_model_len}` : "";
  $("fill").style.width = `${Math.min(100 * here.used / (card.max_model_len || 1), 100)}%`;
  $("send").textContent = run ? "■" : "↑";
  $("send").ariaLabel = $("send").title = run ? t("stop") : t("send");
  $("clear").disabled = !!run || !here.messages.length;
  drawChats();
  $("messages").replaceChildren(...here.messages.map((message, i) => drawMessage(message, i, run)));
  if (!here.messages.length) $("messages").append(drawEmpty());
  if (stays) toEnd();
}
function show() { document.body.className = ""; save(state); draw(); }
function drawChats() { $("chats").replaceChildren(...chats.map(drawChat)); }
function drawChat(one) {
  const name = one.messages[0]?.content.slice(0, 60) || t("untitled");
  const open = () => { state.current = one.id; show(); toEnd(); };
  const onclick = () => {
    if (one.messages.length && !confirm(t("sure"))) return;
    drop(one);
    try { localStorage.removeItem("mini-llm" + one.id); } catch { }
    show();
  };
  return h("div", { className: one === chat() ? "chat here" : "chat" },
    h("button", { className: "name", onclick: open }, name),
    h("button", { className: "drop", title: t("drop"), ariaLabel: t("drop"), onclick }, "×"));
}
function drawMessage(message, index, run) {
  const live = run?.reply === message, node = document.createTextNode(message.content);
  if (live) run.node = node;
  const box = h("div", { className: `message ${message.role}` });
  box.append(h("div", { className: "text" }, node));
  box.classList.toggle("live", live);
  if (message.forgotten) { box.classList.add("forgotten"); box.title = t("forgotten"); }
  if (message.error) box.append(h("div", { className: "error" }, message.error));
  const tools = h("div", { className: "tools" });
  const tool = (word, action) => tools.append(h("button", { onclick: action }, t(word)));
  if (!run) {
    const mine = message.role === "user", asked = mine ? index : index - 1;
    if (mine) tool("edit", () => drawEdit(box, message, index));
    if (index === chat().messages.length - 1)
      tool("retry", () => say(chat().messages[asked].content, asked, chat().tries + 1));
    // there is no clipboard for a page that came over http from another machine
    if (message.content && navigator.clipboard) tool("copy", async event => {
      await navigator.clipboard.writeText(message.content);
      event.target.textContent = t("copied");
    });
    tools.append(message.note || "");
  }
  box.append(tools);
  return box;
}
function drawEdit(box, message, index) {
  const area = h("textarea", { value: message.content, rows: 3 });
  const send = () => say(area.value, index);
  area.onkeydown = event => {
    if (enters(event)) { event.preventDefault(); send(); }
    if (event.key === "Escape" && !event.isComposing) draw();
  };
  box.replaceChildren(h("div", { className: "edit" }, area, h("div", { className: "tools" },
    h("button", { onclick: send }, t("send")), h("button", { onclick: draw }, t("cancel")))));
  area.focus();
}
function drawEmpty() {
  const samples = SAMPLES.map(text => h("button", { onclick: () => say(text) }, text));
  return h("div", { id: "empty" }, h("h1", {}, t("hello")), h("div", {}, ...samples));
}

// ---- what the user does
function enters(event) {                     // 229: an input method has the key, also in Safari
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}
function submit() {
  const run = runs.get(chat());
  if (run) return run.abort.abort();
  const text = $("input").value;
  $("input").value = "";
  say(text);
}
$("input").onkeydown = event => {
  if (!enters(event)) return;
  event.preventDefault();
  if (!runs.has(chat())) submit();
};
document.querySelector("form").onsubmit = event => { event.preventDefault(); submit(); };
$("new").onclick = () => {
  const empty = chats.find(one => !one.messages.length) || newChat();
  if (!chats.includes(empty)) add(empty);
  state.current = empty.id;
  show(); $("input").focus();
};
$("clear").onclick = () => {
  save(Object.assign(chat(), { messages: [], used: 0 }));
  show();
};
$("gear").onclick = () => { $("settings").hidden = !$("settings").hidden; };
$("language").onclick = () => { state.lang = state.lang === "zh" ? "en" : "zh"; show(); };
$("burger").onclick = () => { document.body.className = "open"; };
$("shade").onclick = () => { document.body.className = ""; };
$("system").oninput = () => { chat().system = $("system").value; save(chat()); };
for (const name of OPTIONS) $(name).oninput = () => {
  const value = $(name).value === "" ? undefined : $(name).valueAsNumber;
  state.options[name] = value;
  save(state);
};
window.onpagehide = () => save(...runs.keys());               // what has come of an answer so far
window.onstorage = follow;
restore();
draw();
toEnd();
call("v1/models").then(response => response.json()).then(models => {
  card = models.data[0];
  draw();
}).catch(error => { $("hint").textContent = error.message; });
