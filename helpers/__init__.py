"""Forgebook's package, in layers; a module imports only from layers below its own (tests/test_architecture.py).

layer  module          one line
0      errors          what a user can get wrong
1      schema          every config key: type, default, meaning
1      retired         names of older LLMForge files, translated
1      files           local files and folders that are complete or absent
1      ranks           which worker this is; errors that reach all
1      extensions      DeepSpeed's C++ extensions, built before they are needed
1      cluster         the Ray cluster: this machine's own, or a larger one, with what goes to its workers
1      classification  labels as tokens; scores of a classifier
1      scores          right or wrong, intervals, paired tests
1      tool_calls      tool calls in an answer's text; the mistakes by kind
1      judge           a language model compares two answers
1      preferences     losses that prefer one answer to another
1      formats         one raw row, in any format -> one checked conversation
1      vllm            what vLLM can load
1      special_tokens  special tokens inside messages stay text
1      tool_text       tools as text, for templates that know none
2      stopping        SIGTERM: save, then end
2      sources         the text and the lines of a config file; key=value overrides
2      buckets         s3:// and gs://: listed, read, written; what their errors mean
2      catalog         GPUs with memory, peak and price; shapes of core models
3      config          YAML file or URL + overrides -> FinetuneConfig
3      fetching        local copies of s3://, gs://, https:// paths
3      mirror          a run folder and its copy in a bucket
4      hardware        this machine's GPUs, processor and memory
4      choices         what the program chose, with reasons, and how it is told
4      memory          bytes per GPU and host, before anything is loaded
4      storage         where runs are kept: the run folder; the list of models
4      adapters        what a saved adapter needs besides its weights
4      kernels         Liger, torch.compile, bitsandbytes: what this machine has
4      prompt_formats  LLMForge's templates by role
4      arguments       what verbs share: words -> target, overrides, options
5      prompts         messages -> token ids and the mask of what is trained
5      rows            files, buckets and data sets -> raw rows with their places
5      models          tokenizer, weights, LoRA
5      losses          the loss at supervised positions only, in chunks
5      optimizers      AdamW with float32 master weights; learning rates
5      progress        metrics.jsonl and what the console follows
5      findings        what an evaluation found, written down
6      vllm_command    serving with vLLM: whether it can, and the command
6      counting        the tokens of the training rows, in two seconds
6      paces           what past runs on this machine achieved
6      tokens          tokenised rows on disk, and views of them: truncation, mixing
7      fitting         whether a run fits; what would make it
7      data            rows -> tokens, in process or with Ray Data, once
7      batches         packing; which rows make up a step; tensors
7      relay           workers that do not see the run's folder
8      plan            memory, steps, time and money before a run
8      checkpoints     save, verify, keep the best, resume
8      objectives      what a task minimises and measures
8      reference       the reference model's log-probabilities
8      worker          a worker's model, optimizer and place among the others
8      defaults        what --default chooses, with reasons
8      preview         rows as the model will see them
8      likelihood      how likely a model finds given texts
8      generate        prompts -> completions
9      prepare         data and config made ready for a run; the data report
9      train           the loop
9      plan_text       a plan as people read it
9      answers         a file of prompts -> a file of answers
9      chat            a conversation in the terminal
9      evaluate        base and tuned answers compared
9      merge           an adapter and its base -> one model
9      engine          many askers, one thread that generates, small batches
9      harness         lm-eval's tasks, before and after
9      publish         a model on the hub, or as a GGUF file
9      plots           figures
9      console         the one stream that a person reads
9      trackers        wandb, MLflow and TensorBoard beside a run
10     chat_api        OpenAI's chat requests checked, answers in its form
10     forecast        the plan of a run about to start; what it says beside what was measured
10     briefing        what a person reads before a run
10     jobs            the same run as a job: Ray Jobs, KubeRay, Anyscale
11     serve           an OpenAI-compatible endpoint
11     summary         summary.json, and what a person reads at a run's end
12     launch          config -> Ray Train workers -> run folder
13     tune            sweeps: trials of one config, stopped early
14     train_verbs     the verbs that take a CONFIG
14     model_verbs     the verbs that ask, measure, merge and serve a RUN
14     keep_verbs      the verbs that list, show, delete, push and export
15     cli             the verbs of main.py
"""
