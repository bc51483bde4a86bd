"""vLLM as an engine, in process or as servers. Nothing here imports vllm before an engine starts."""
