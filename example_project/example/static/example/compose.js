// Says before the upload that a file is too large; the server says it all the same.

const form = document.querySelector("form[data-limit]");
const input = form.elements.attachment;
const limit = Number(form.dataset.limit);

function error() {
  return document.getElementById("attachment-error");
}

input.addEventListener("change", () => {
  error()?.remove();
  const [file] = input.files;
  const isTooLarge = file !== undefined && file.size > limit;
  input.toggleAttribute("aria-invalid", isTooLarge);
  input.setAttribute("aria-describedby", "attachment-help");
  if (!isTooLarge) return;
  const said = document.createElement("p");
  said.className = "wrong";
  said.id = "attachment-error";
  said.setAttribute("role", "alert");
  said.textContent = `This file is too large; the limit is ${limit / 2 ** 20} MB.`;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", "attachment-error attachment-help");
  input.after(said);
});

form.addEventListener("submit", (event) => {
  if (error() && input.files[0]?.size > limit) {
    event.preventDefault();
    input.focus();
  }
});
