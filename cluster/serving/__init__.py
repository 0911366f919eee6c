"""The engine: OpenAI API, continuous batching, KV cache, sampler, model skeleton. Runs without Ray."""
