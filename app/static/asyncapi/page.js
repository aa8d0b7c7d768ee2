// Shows the document that is embedded in the page.
AsyncApiStandalone.render(
  JSON.parse(document.getElementById("document").textContent),
  document.getElementById("asyncapi"),
);
