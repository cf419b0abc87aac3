"""Forgebook's package, in layers; a module imports only from layers below its own (tests/test_architecture.py).

layer  module        one line
0      errors        what a user can get wrong
1      schema        every config key: type, default, meaning
1      retired       names of older LLMForge files, translated
1      ranks         which worker this is; errors that reach all
2      sources       the text and the lines of a config file; key=value overrides
3      config        YAML file or URL + overrides -> FinetuneConfig
4      prompts       messages -> token ids and the mask of what is trained
4      storage       local, s3://, gs://, https:// paths; the run folder
5      data          rows -> checked -> tokens -> batches
5      models        tokenizer, weights, LoRA
5      losses        the loss at supervised positions only, in chunks
5      optimizers    AdamW with float32 master weights; learning rates
5      checkpoints   save, verify, keep the best, resume
5      progress      metrics.jsonl and what the console follows
6      train         the loop
6      generate      prompts -> completions
7      evaluate      base and tuned answers compared
7      plots         figures
7      console       the one stream that a person reads
8      launch        config -> Ray Train workers -> run folder
9      cli           the verbs of main.py
"""
