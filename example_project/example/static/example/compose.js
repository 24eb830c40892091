// Says before the upload that a file is too large; the server says it all the same.

const form = document.querySelector("form[data-limit]");
const input = form.elements.attachment;
const limit = Number(form.dataset.limit);

function error() {
  return document.getElementById(`${input.id}_error`);
}

input.addEventListener("change", () => {
  error()?.remove();
  const [file] = input.files;
  const isTooLarge = file !== undefined && file.size > limit;
  input.removeAttribute("aria-invalid");
  input.setAttribute("aria-describedby", `${input.id}_helptext`);
  if (!isTooLarge) return;
  const said = document.createElement("p");
  said.className = "wrong";
  said.id = `${input.id}_error`;
  said.setAttribute("role", "alert");
  said.textContent = `This file is too large; the limit is ${limit / 2 ** 20} MB.`;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", `${input.id}_helptext ${said.id}`);
  input.after(said);
});

form.addEventListener("submit", (event) => {
  if (error() && input.files[0]?.size > limit) {
    event.preventDefault();
    input.focus();
  }
});
