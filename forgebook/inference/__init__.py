"""Prompts -> answers: generate, chat, an OpenAI-compatible server, vLLM's command."""
