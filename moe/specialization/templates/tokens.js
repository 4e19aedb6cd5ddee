"use strict";
// Colors the tokens by their experts in the selected layer, and shows all experts of one token in the panel.
// Routing: for each layer and token [expert, weight in thousandths, expert, weight, ...], the heaviest first.
(() => {
  const HINT = "Point at a token, tap it, or press Tab, to see all its experts.";
  const find = (id) => document.getElementById(id);
  const routing = JSON.parse(find("routing").textContent);
  const texts = [...document.querySelectorAll(".text")];
  const tokens = texts.flatMap((text) => [...text.children]);
  const kinds = tokens.map((token) => token.className.replace(/ ?e\d+$/, "")); // "part", "newline", "broken" or ""
  const place = new Map(tokens.map((token, index) => [token, index]));
  const layers = [...document.querySelectorAll("input[name=layer]")];
  const legend = [...document.querySelectorAll("ul button")];
  let layer = 0;
  let alone = null; // the expert whose tokens alone are colored
  let current = null; // the token that has the keyboard's focus, or was tapped last
  let shown = null; // the token in the panel: `current`, or the one below the mouse

  const element = (name, className, ...content) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...content);
    return made;
  };
  const experts = (assignments) => assignments.filter((_, index) => index % 2 === 0);
  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const percent = (part) => `${((100 * part) / tokens.length).toFixed(part && part * 100 < tokens.length ? 1 : 0)} %`;

  function look(assignments) {
    const rank = alone === null ? 0 : experts(assignments).indexOf(alone);
    if (rank < 0) return "other";
    if (!assignments.length) return "";
    return rank ? `minor e${alone}` : `e${assignments[0]}`;
  }

  function paint() {
    const here = Number(layers[layer].dataset.experts); // layers can have different numbers of experts
    if (alone !== null && alone >= here) alone = null;
    const taken = legend.map(() => 0);
    const heaviest = legend.map(() => 0);
    let without = 0;
    tokens.forEach((token, index) => {
      const assignments = routing[layer][index];
      token.className = `${kinds[index]} ${look(assignments)}${index === shown ? " shown" : ""}`;
      for (const expert of experts(assignments)) taken[expert] += 1;
      if (assignments.length) heaviest[assignments[0]] += 1;
      else without += 1;
    });
    legend.forEach((button, expert) => {
      button.parentElement.hidden = expert >= here;
      button.setAttribute("aria-pressed", String(expert === alone));
      button.setAttribute("aria-label", `expert ${expert}, takes ${percent(taken[expert])} of the tokens`);
      button.querySelector(".share").textContent = percent(taken[expert]);
    });
    if (alone === null) {
      const most = Math.max(0, ...routing[layer].map((assignments) => assignments.length / 2));
      const several = most > 1 ? ` A token goes to up to ${most} experts, so the shares add up to more than 100 %; its color is that of the expert with the largest weight.` : "";
      const where = `In layer ${layer}, each expert takes the share of the ${count(tokens.length, "token")} that stands beside its number.${several}`;
      const plain = without ? ` ${count(without, "token")} without color ${without === 1 ? "has" : "have"} no expert.` : "";
      find("status").textContent = `${where} Select an expert to see its tokens alone.${plain}`;
      return;
    }
    const minor = taken[alone] - heaviest[alone];
    const others = minor ? ` ${minor.toLocaleString("en")} of them, without a colored background, have a heavier expert.` : "";
    find("status").textContent =
      `Expert ${alone} takes ${taken[alone].toLocaleString("en")} of ${count(tokens.length, "token")} in layer ${layer}.${others}`;
  }

  function name(index) {
    let first = index;
    while (first && kinds[first] === "part") first -= 1;
    let end = first + 1;
    while (end < tokens.length && kinds[end] === "part") end += 1;
    const text = tokens[first].textContent.replaceAll("\n", "↵");
    const part = end - first > 1 ? `part ${index - first + 1} of ${end - first} of ` : "";
    return [part, text];
  }

  function show(index) {
    if (shown !== null) tokens[shown].classList.remove("shown");
    shown = index;
    if (index === null) {
      find("token").replaceChildren(HINT);
      find("routes").replaceChildren();
      return;
    }
    tokens[index].classList.add("shown");
    const [part, text] = name(index);
    const where = `token ${(index + 1).toLocaleString("en")} of ${tokens.length.toLocaleString("en")}`;
    const spaces = /^ +$/.test(text) ? ` (${count(text.length, "space")})` : "";
    find("token").replaceChildren(part, element("strong", "", `“${text}”`), spaces, element("small", "", where));
    const rows = routing.map((of, number) => {
      const assignments = of[index];
      const cell = element("td", "");
      experts(assignments).forEach((expert, rank) => {
        const weight = assignments[2 * rank + 1];
        const value = weight === null ? "not a number" : (weight / 1000).toFixed(3);
        cell.append(element("span", "pair", element("span", `chip e${expert}`, String(expert)), ` ${value}`), " ");
      });
      if (!assignments.length) cell.append("no expert");
      const row = element("tr", number === layer ? "on" : "", element("th", "", String(number)), cell);
      row.firstChild.scope = "row";
      return row;
    });
    const head = element("tr", "", element("th", "", "layer"), element("th", "", "experts and their gate weights"));
    find("routes").replaceChildren(element("table", "", element("thead", "", head), element("tbody", "", ...rows)));
    const panel = find("panel");
    const on = panel.querySelector(".on");
    if (panel.scrollHeight > panel.clientHeight) panel.scrollTop = on.offsetTop - panel.clientHeight / 2;
  }

  function choose(index, focus) {
    const before = current ?? 0;
    if (before !== index) {
      for (const name of ["tabindex", "aria-selected", "aria-describedby"]) tokens[before].removeAttribute(name);
    }
    current = index;
    tokens[index].tabIndex = 0;
    tokens[index].setAttribute("aria-selected", "true");
    tokens[index].setAttribute("aria-describedby", "routes");
    show(index);
    if (focus) tokens[index].focus({ preventScroll: true });
    tokens[index].scrollIntoView({ block: "nearest" });
  }

  function select(number) {
    if (number < 0 || number >= layers.length) return;
    layer = number;
    layers[number].checked = true;
    layers[number].parentElement.scrollIntoView({ block: "nearest", inline: "nearest" });
    paint();
    show(shown);
  }

  function isolate(expert) {
    alone = expert;
    paint();
  }

  // The token in the next line of text (step 1) or the one before (step -1) that is nearest in this line.
  function vertical(index, step) {
    const box = (at) => tokens[at].getClientRects()[0] ?? tokens[at].getBoundingClientRect();
    const from = box(index);
    let best = null;
    let line = null;
    for (let at = index + step; at >= 0 && at < tokens.length; at += step) {
      const { top, left } = box(at);
      if (Math.abs(top - from.top) < 4) continue;
      line ??= top;
      if (Math.abs(top - line) >= 4) break;
      if (best === null || Math.abs(left - from.left) < Math.abs(box(best).left - from.left)) best = at;
    }
    return best ?? index;
  }

  const moves = {
    ArrowLeft: (index) => index - 1,
    ArrowRight: (index) => index + 1,
    ArrowUp: (index) => vertical(index, -1),
    ArrowDown: (index) => vertical(index, 1),
    Home: () => 0,
    End: () => tokens.length - 1,
  };
  const bounded = (index) => Math.min(Math.max(index, 0), tokens.length - 1);

  for (const text of texts) {
    text.setAttribute("role", "listbox");
    text.setAttribute("aria-orientation", "horizontal");
    text.addEventListener("click", (event) => {
      if (place.has(event.target)) choose(place.get(event.target), true);
    });
    text.addEventListener("focusin", (event) => {
      if (place.has(event.target) && place.get(event.target) !== current) choose(place.get(event.target), false);
    });
    text.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && place.has(event.target)) show(place.get(event.target));
    });
    text.addEventListener("pointerleave", () => show(current));
    text.addEventListener("keydown", (event) => {
      if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey || current === null) return;
      event.preventDefault();
      choose(bounded(moves[event.key](current)), true);
    });
  }
  tokens.forEach((token, index) => {
    token.setAttribute("role", "option");
    const [part, text] = name(index);
    if (part || !text.trim()) token.setAttribute("aria-label", part ? part + text : "space");
  });
  document.addEventListener("keydown", (event) => {
    const composed = event.getModifierState("AltGraph"); // brackets need this key on many keyboards
    if (!composed && (event.altKey || event.ctrlKey || event.metaKey)) return;
    if (/^\d$/.test(event.key)) select(Number(event.key));
    else if (event.key === "[") select(layer - 1);
    else if (event.key === "]") select(layer + 1);
    else if (event.key === "Escape") isolate(null);
  });
  layers.forEach((input, number) => input.addEventListener("change", () => select(number)));
  legend.forEach((button, expert) => {
    button.disabled = false;
    button.tabIndex = expert ? -1 : 0; // one stop of the tab key, as in the text
    button.addEventListener("click", () => isolate(alone === expert ? null : expert));
    button.addEventListener("focus", () => legend.forEach((other) => (other.tabIndex = other === button ? 0 : -1)));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const here = Number(layers[layer].dataset.experts);
      legend[(expert + step + here) % here].focus();
    });
  });
  find("previous").addEventListener("click", () => choose(bounded((current ?? 1) - 1), false));
  find("next").addEventListener("click", () => choose(bounded((current ?? -1) + 1), false));

  document.querySelector("fieldset").hidden = false;
  document.querySelector("details").open = legend.length <= 16 || innerWidth > 600; // on a phone, the text comes first
  find("hint").textContent = HINT; // beside a narrow text there is no panel before a token is chosen
  find("hint").hidden = find("panel").hidden = false;
  find("unscripted").hidden = true;
  tokens[0].tabIndex = 0;
  show(null);
  paint();
})();
