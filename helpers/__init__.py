"""Forgebook's package, in layers; a module imports only from layers below its own (tests/test_architecture.py).

layer  module        one line
0      errors        what a user can get wrong
1      schema        every config key: type, default, meaning
1      retired       names of older LLMForge files, translated
1      sources       the text and the lines of a config file; key=value overrides
1      config        YAML file or URL + overrides -> FinetuneConfig
1      prompts       messages -> token ids and the mask of what is trained
1      storage       local, s3://, gs://, https:// paths; the run folder
2      data          rows -> checked -> tokens -> batches
2      models        tokenizer, weights, LoRA
2      losses        the loss at supervised positions only, in chunks
2      optimizers    AdamW with float32 master weights; learning rates
2      ranks         which worker this is; errors that reach all
2      checkpoints   save, verify, keep the best, resume
2      progress      metrics.jsonl and what the console follows
3      train         the loop
3      generate      prompts -> completions
4      evaluate      base and tuned answers compared
4      plots         figures
4      console       the one stream that a person reads
5      launch        config -> Ray Train workers -> run folder
6      cli           the verbs of main.py
"""
