// The OpenAPI description as a page: every path, its fields and its statuses.

function element(name, text = "", ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

function kindOf(schema) {
  if (schema.anyOf) return schema.anyOf.map(kindOf).filter((kind) => kind !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  const limits = [
    ["minimum", "from "],
    ["exclusiveMinimum", "above "],
    ["maximum", "to "],
    ["exclusiveMaximum", "below "],
  ].filter(([name]) => name in schema);
  return [schema.type, ...limits.map(([name, word]) => word + schema[name])].join(" ");
}

function fieldsTable(schema) {
  const rows = Object.entries(schema.properties).map(([name, field]) => {
    const title = element("td", "", element("code", name));
    if (schema.required.includes(name)) title.append(" (required)");
    const told = element("td", field.description ?? "");
    return element("tr", "", title, element("td", kindOf(field)), told);
  });
  return element("table", "", ...rows);
}

function statusList(responses) {
  const items = Object.entries(responses).map(([status, response]) =>
    element("li", `${status}: ${response.description}`),
  );
  return element("ul", "", ...items);
}

const description = await (await fetch("openapi.json")).json();
for (const [path, item] of Object.entries(description.paths)) {
  for (const method of ["get", "post"].filter((name) => name in item)) {
    const operation = item[method];
    const section = element("section", "", element("h2", `${method.toUpperCase()} ${path}`));
    section.append(element("p", operation.summary));
    const body = operation.requestBody?.content["application/json"].schema.$ref;
    if (body) section.append(fieldsTable(description.components.schemas[body.split("/").pop()]));
    section.append(statusList(operation.responses));
    document.querySelector("#paths").append(section);
  }
}
