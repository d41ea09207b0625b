/* Live availability for the spawn form. The page works without it: it only fetches the same page again and swaps
   the parts marked data-ds01-live and the disabled states. The choice, the focus and what was typed stay. */
(function () {
  "use strict";
  var EVERY_MS = 10000;
  var root = document.querySelector("[data-ds01-form]");
  if (!root || !window.fetch || !window.DOMParser) return;
  var page = root.closest("form") || document;
  var touched = false;
  var busy = false;
  var over = false;
  var last = Date.now();

  function radios(where) {
    return Array.from(where.querySelectorAll('input[name="choice"]'));
  }
  function checked(where) {
    return radios(where).find(function (radio) { return radio.checked; });
  }
  function titleOf(radio) {
    var title = radio && document.getElementById(radio.getAttribute("aria-labelledby"));
    return title ? title.textContent.trim() : "";
  }
  function say(text) {
    root.querySelector("[data-ds01-say]").textContent = text;
  }

  /* The Start button names the choice and waits while the chosen card cannot start. */
  function sync() {
    var radio = checked(root);
    var ready = Boolean(radio) && !radio.disabled;
    page.querySelectorAll('button[type="submit"]').forEach(function (button) { button.disabled = !ready; });
    page.querySelectorAll("[data-ds01-chosen]").forEach(function (place) {
      place.textContent = ready ? titleOf(radio) : "Nothing that can start is chosen";
    });
  }

  /* Other cards than before, because the rules were edited: what was chosen, typed and opened stays as far as it can. */
  function replaceChoice(fresh, value) {
    var place = root.querySelector("[data-ds01-choice]");
    var open = Boolean(place.querySelector("details[open]"));
    var typed = Array.from(place.querySelectorAll("input.form-control, select")).map(function (field) {
      return [field.name, field.value];
    });
    place.innerHTML = fresh.querySelector("[data-ds01-choice]").innerHTML;
    var details = place.querySelector("details");
    if (details) details.open = open;
    typed.forEach(function (pair) {
      var field = Array.from(place.querySelectorAll("input.form-control, select")).find(function (other) {
        return other.name === pair[0];
      });
      if (!field) return;
      field.value = pair[1];
      if (field.selectedIndex === -1) field.selectedIndex = 0;
    });
    var again = radios(root).find(function (radio) { return radio.value === value && !radio.disabled; });
    if (again) again.checked = true;
  }

  function swap(fresh) {
    var now = checked(root);
    var wasReady = Boolean(now) && !now.disabled;
    var theirs = radios(fresh);
    var same = radios(root).map(function (r) { return r.value; }).join("\n") ===
      theirs.map(function (r) { return r.value; }).join("\n");
    if (same) {
      radios(root).forEach(function (radio, index) { radio.disabled = theirs[index].disabled; });
    } else {
      replaceChoice(fresh, now && now.value);
    }
    root.querySelectorAll("[data-ds01-live]").forEach(function (place) {
      var name = place.getAttribute("data-ds01-live");
      var twin = Array.from(fresh.querySelectorAll("[data-ds01-live]")).find(function (other) {
        return other.getAttribute("data-ds01-live") === name;
      });
      if (twin && twin.innerHTML !== place.innerHTML) place.innerHTML = twin.innerHTML;
    });
    now = checked(root);
    var theirChoice = checked(fresh);
    if (!touched && now && now.disabled && theirChoice && !theirChoice.disabled) {
      radios(root).find(function (radio) { return radio.value === theirChoice.value; }).checked = true;
      say(titleOf(checked(root)) + " is chosen now.");
    } else if (wasReady && now && now.disabled) {
      say(titleOf(now) + " cannot start any more. Choose another card.");
    }
    sync();
  }

  function outdated() {
    over = true;
    var place = root.querySelector('[data-ds01-live="notes"]');
    var note = document.createElement("p");
    var link = document.createElement("a");
    note.className = "ds01-note";
    note.textContent = "This page is out of date: your server is starting or running, or you are logged out. ";
    link.href = window.location.pathname;
    link.textContent = "Open it again";
    note.appendChild(link);
    place.replaceChildren(note);
  }

  function refresh() {
    if (busy || over || document.hidden) return;
    busy = true;
    last = Date.now();
    fetch(window.location.pathname, { credentials: "same-origin", cache: "no-store", headers: { Accept: "text/html" } })
      .then(function (answer) {
        if (!answer.ok) throw new Error(String(answer.status));
        return answer.text().then(function (text) {
          var fresh = new DOMParser().parseFromString(text, "text/html").querySelector("[data-ds01-form]");
          if (over) return;
          if (fresh) swap(fresh);
          else outdated();
        });
      })
      .catch(function () { /* the Hub restarts, the network is away: the next round tries again */ })
      .finally(function () { busy = false; });
  }

  /* Clicking the preselected card changes nothing, but it is a choice all the same. */
  ["change", "click"].forEach(function (kind) {
    root.addEventListener(kind, function (event) {
      if (event.target.name === "choice") { touched = true; sync(); }
    });
  });
  if (page.addEventListener) page.addEventListener("submit", function () { over = true; });
  window.addEventListener("pageshow", function (event) { if (event.persisted) window.location.reload(); });
  function soon() { if (Date.now() - last > 2000) refresh(); }
  document.addEventListener("visibilitychange", soon);
  window.addEventListener("focus", soon);
  window.setInterval(refresh, EVERY_MS);
  /* The Start button comes after this script in the page. */
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", sync);
  else sync();
})();
