// openai's client for Node. Settings come in as JSON on standard input, results go out as JSON.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const settings = JSON.parse(readFileSync(0, "utf8"));
const model = settings.model;
const connect = (changed = {}) =>
  new OpenAI({ baseURL: `${settings.url}/v1`, apiKey: settings.key, maxRetries: 0, ...changed });
const client = connect();
const user = (content) => [{ role: "user", content }];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
    },
  },
};
const citySchema = {
  type: "object",
  properties: { name: { type: "string" }, inhabitants: { type: "integer" } },
  required: ["name", "inhabitants"],
  additionalProperties: false,
};

async function raised(call) {
  try {
    return { classes: [], returned: JSON.stringify(await call()) };
  } catch (error) {
    const classes = [];
    for (let type = error.constructor; type?.name; type = Object.getPrototypeOf(type)) classes.push(type.name);
    const { status = null, code = null, param = null } = error;
    return { classes, status, code, param, message: error.message };
  }
}

async function joined(stream) {
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

const cases = {
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    return ids;
  },
  async chat() {
    const answer = await client.chat.completions.create({ model, messages: user("emoji") });
    return { text: answer.choices[0].message.content, usage: answer.usage };
  },
  async chat_stream() {
    return joined(
      await client.chat.completions.create({
        model,
        messages: user("emoji"),
        stream: true,
        stream_options: { include_usage: true },
      }),
    );
  },
  async stream_helper() {
    const stream = client.chat.completions.stream({ model, messages: user("emoji") });
    const answer = await stream.finalChatCompletion();
    return answer.choices[0].message.content;
  },
  async completions() {
    const answer = await client.completions.create({ model, prompt: "hi" });
    return answer.choices[0].text;
  },
  async embeddings() {
    const packed = await client.embeddings.create({ model, input: ["hi", "there"] });
    const plain = await client.embeddings.create({ model, input: ["hi", "there"], encoding_format: "float" });
    return [packed, plain].map((answer) => answer.data.map((entry) => entry.embedding));
  },
  async tools() {
    const found = {};
    const named = { type: "function", function: { name: "weather" } };
    for (const [name, tool_choice] of [["auto", "auto"], ["required", "required"], ["named", named]]) {
      const answer = await client.chat.completions.create({
        model,
        messages: user("What is the weather?"),
        tools: [weather],
        tool_choice,
      });
      const [choice] = answer.choices;
      const [call] = choice.message.tool_calls;
      found[name] = [call.function.name, call.function.arguments, choice.finish_reason];
    }
    return found;
  },
  async tools_streamed() {
    const stream = client.chat.completions.stream({ model, messages: user("Compare both cities."), tools: [weather] });
    const answer = await stream.finalChatCompletion();
    return answer.choices[0].message.tool_calls.map((call) => [call.function.name, call.function.arguments]);
  },
  async tool_loop() {
    const runner = client.chat.completions.runTools({
      model,
      messages: user("What is the weather?"),
      tools: [
        {
          type: "function",
          function: {
            ...weather.function,
            parse: JSON.parse,
            function: ({ city }) => `twenty-one degrees in ${city}`,
          },
        },
      ],
    });
    return runner.finalContent();
  },
  async structured() {
    const answer = await client.chat.completions.parse({
      model,
      messages: user("Oslo as JSON"),
      response_format: { type: "json_schema", json_schema: { name: "City", schema: citySchema, strict: true } },
    });
    return JSON.parse(answer.choices[0].message.content);
  },
  async responses() {
    const answer = await client.responses.create({ model, input: "emoji" });
    const kinds = [];
    let text = "";
    for await (const event of await client.responses.create({ model, input: "emoji", stream: true })) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    return { whole: answer.output_text, text, first: kinds[0], last: kinds.at(-1) };
  },
  async errors() {
    const create = (fields, from = client) => () =>
      from.chat.completions.create({ model, messages: user("hi"), ...fields });
    const streamed = async () => joined(await create({ messages: user("fails"), stream: true })());
    return {
      value: await raised(create({ temperature: 3 })),
      length: await raised(create({ messages: user("x".repeat(10000)) })),
      key: await raised(create({}, connect({ apiKey: "wrong" }))),
      model: await raised(create({ model: "nope" })),
      full: await raised(create({}, connect({ baseURL: `${settings.full_url}/v1` }))),
      in_stream: await raised(streamed),
    };
  },
};

const results = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    results[name] = await run();
  } catch (error) {
    results[name] = { crashed: error.stack };
  }
}
process.stdout.write(`\n${JSON.stringify(results)}\n`);
