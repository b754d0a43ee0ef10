// What settings there are, from the gateway's own description of itself.

let asked = null;

/** Settings by name, each with description, type and, where it has one, default. */
export function defaults() {
  asked ??= fetch("/openapi.json")
    .then((answer) => answer.json())
    .then((document) => document.paths["/v1/jobs"].post.requestBody.content["application/json"].schema.properties)
    .catch((error) => {
      asked = null;
      throw error;
    });
  return asked;
}
