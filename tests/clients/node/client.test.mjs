// OpenAI's own client for Node. Where the server is and what it serves comes from the environment.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from "openai";

const { TANDEM_URL: baseURL, TANDEM_KEY: apiKey, TANDEM_MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, max_tokens: 60, temperature: 0 };
const parameters = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Paris", "Rome"] },
    degrees: { type: "integer", minimum: -50, maximum: 50 },
  },
  required: ["city", "degrees"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const tool_choice = { type: "function", function: { name: "weather" } };

function checkWeather(text) {
  const { city, degrees } = JSON.parse(text);
  assert.ok(["Paris", "Rome"].includes(city));
  assert.ok(Number.isInteger(degrees));
}

test("a chat", async () => {
  const answer = await client.chat.completions.create(options);
  assert.match(answer.choices[0].message.content, /Paris/);
  assert.ok(answer.usage.completion_tokens > 0);
});

test("a stream says the same", async () => {
  const whole = await client.chat.completions.create(options);
  const stream = await client.chat.completions.create({
    ...options,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test("a stream that is left ends", async () => {
  const stream = await client.chat.completions.create({ ...options, max_tokens: 500, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    break;
  }
  assert.ok(stream.controller.signal.aborted);
});

test("the stream helper", async () => {
  const answer = await client.chat.completions.stream(options).finalChatCompletion();
  assert.match(answer.choices[0].message.content, /Paris/);
});

test("a completion", async () => {
  const answer = await client.completions.create({ model, prompt: "France is", max_tokens: 8 });
  assert.ok(answer.choices[0].text.length > 0);
});

test("a tool is called", async () => {
  const answer = await client.chat.completions.create({ ...options, tools, tool_choice });
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  checkWeather(call.function.arguments);
});

test("a tool is called in a stream", async () => {
  const runner = client.chat.completions.stream({ ...options, tools, tool_choice });
  const answer = await runner.finalChatCompletion();
  checkWeather(answer.choices[0].message.tool_calls[0].function.arguments);
});

test("structured output", async () => {
  const answer = await client.chat.completions.parse({
    ...options,
    response_format: { type: "json_schema", json_schema: { name: "weather", schema: parameters } },
  });
  checkWeather(answer.choices[0].message.content);
});

test("the models", async () => {
  const names = [];
  for await (const card of client.models.list()) names.push(card.id);
  assert.ok(names.includes(model));
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("errors have their kinds", async () => {
  const create = (changes) => client.chat.completions.create({ ...options, ...changes });
  await assert.rejects(create({ model: "gpt-9" }), (error) => {
    assert.ok(error instanceof NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    return true;
  });
  await assert.rejects(create({ temperature: 1000 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, "temperature");
    assert.equal(error.type, "invalid_request_error");
    return true;
  });
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), AuthenticationError);
});
