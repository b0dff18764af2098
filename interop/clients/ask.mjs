// Asks through the official clients for Node; runs beside their own node_modules.
//
// It reads one case as JSON from each line of its input, and writes what the client gave as one line of JSON.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import readline from "node:readline";

const require = createRequire(`${process.argv[2]}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)));

const { default: OpenAI } = await load("openai");
const { default: Anthropic } = await load("@anthropic-ai/sdk");
const { generateText, streamText } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { ChatOpenAI } = await load("@langchain/openai");
const { ChatAnthropic } = await load("@langchain/anthropic");

const KEY = "key";
const TOKENS = 8;

const retries = (it) => (it.retries ? {} : { maxRetries: 0 });
const messages = (it) => [{ role: "user", content: it.prompt }];
const openai = (it) => new OpenAI({ baseURL: `${it.base}/v1`, apiKey: KEY, ...retries(it) });

async function join(stream, read) {
  let text = "";
  for await (const each of stream) text += read(each) ?? "";
  return text;
}

async function openaiChat(it) {
  const body = { model: it.model, messages: messages(it), max_tokens: TOKENS, stream: it.stream, ...it.extra };
  const answer = await openai(it).chat.completions.create(body);
  return it.stream ? join(answer, (each) => each.choices[0]?.delta.content) : answer.choices[0].message.content;
}

async function openaiCompletions(it) {
  const body = { model: it.model, prompt: it.prompt, max_tokens: TOKENS, stream: it.stream, ...it.extra };
  const answer = await openai(it).completions.create(body);
  return it.stream ? join(answer, (each) => each.choices[0]?.text) : answer.choices[0].text;
}

async function openaiResponses(it) {
  const body = { model: it.model, input: it.prompt, max_output_tokens: TOKENS, stream: it.stream, ...it.extra };
  const answer = await openai(it).responses.create(body);
  return it.stream ? join(answer, (each) => each.delta) : answer.output_text;
}

async function anthropicMessages(it) {
  const client = new Anthropic({ baseURL: it.base, apiKey: KEY, ...retries(it) });
  const body = { model: it.model, messages: messages(it), max_tokens: TOKENS, stream: it.stream, ...it.extra };
  const answer = await client.messages.create(body);
  return it.stream ? join(answer, (each) => each.delta?.text) : answer.content.map((each) => each.text).join("");
}

// The AI SDK has no way to send a field that it does not know, so its requests are changed on their way.
const changed = (it) => (url, options) =>
  fetch(url, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ...it.extra }) });

async function aiSdk(model, it) {
  const asked = { model, prompt: it.prompt, maxOutputTokens: TOKENS, ...retries(it) };
  if (!it.stream) return (await generateText(asked)).text;
  let problem;
  const { textStream } = streamText({ ...asked, onError: ({ error }) => (problem = error) });
  const text = await join(textStream, (each) => each);
  if (problem) throw problem;
  return text;
}

const aiSdkOpenai = (it) => createOpenAI({ baseURL: `${it.base}/v1`, apiKey: KEY, fetch: changed(it) });
const aiSdkAnthropic = (it) => createAnthropic({ baseURL: `${it.base}/v1`, apiKey: KEY, fetch: changed(it) });

async function langchain(model, it) {
  return it.stream ? join(await model.stream(it.prompt), (each) => each.text) : (await model.invoke(it.prompt)).text;
}

const CLIENTS = {
  openai_chat: openaiChat,
  openai_completions: openaiCompletions,
  openai_responses: openaiResponses,
  anthropic_messages: anthropicMessages,
  ai_sdk_openai_chat: (it) => aiSdk(aiSdkOpenai(it).chat(it.model), it),
  ai_sdk_openai_responses: (it) => aiSdk(aiSdkOpenai(it).responses(it.model), it),
  ai_sdk_anthropic: (it) => aiSdk(aiSdkAnthropic(it)(it.model), it),
  langchain_openai: (it) => {
    const configuration = { baseURL: `${it.base}/v1` };
    const kwargs = { modelKwargs: it.extra, maxTokens: TOKENS, ...retries(it) };
    return langchain(new ChatOpenAI({ model: it.model, apiKey: KEY, configuration, ...kwargs }), it);
  },
  langchain_anthropic: (it) => {
    const kwargs = { invocationKwargs: it.extra, maxTokens: TOKENS, ...retries(it) };
    return langchain(new ChatAnthropic({ model: it.model, apiKey: KEY, anthropicApiUrl: it.base, ...kwargs }), it);
  },
};

console.log = console.error; // the output has the results alone
const write = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
write({ ready: true });
for await (const line of readline.createInterface({ input: process.stdin })) {
  const it = JSON.parse(line);
  try {
    write({ text: String(await CLIENTS[it.client](it)) });
  } catch (error) {
    write({ error: error?.name ?? "Error", message: String(error?.message ?? JSON.stringify(error)) });
  }
}
process.exit(0);
