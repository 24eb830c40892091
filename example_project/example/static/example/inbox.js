// Puts what arrives on top of the list.

import { fill, followWhileSeen, localize } from "./events.js";

const list = document.querySelector("[data-mails]");
const template = document.querySelector("[data-row]");
const empty = document.querySelector("[data-empty]");
const said = document.querySelector("[data-said]");
const { events, newest, kept } = list.dataset;
let known = Number(newest);

for (const time of list.querySelectorAll("time")) localize(time);

followWhileSeen(
  `${events}?after=${newest}`,
  {
    mail(mail) {
      // A stream that was broken off begins anew where the page was loaded.
      if (mail.number <= known) return;
      known = mail.number;
      const row = template.content.cloneNode(true);
      fill(row, "field", mail);
      row.querySelector("a").href = mail.url;
      localize(row.querySelector("time"), mail.iso);
      row.querySelector("li").classList.add("is-new");
      list.prepend(row);
      while (list.children.length > Number(kept)) list.lastElementChild.remove();
      empty.hidden = true;
      said.textContent = `New: ${mail.subject}`;
    },
  },
  document.querySelector("[data-live]"),
);
