"""Names of spec keys in Hugging Face, nanoGPT, litgpt, torchtitan, Megatron and Hydra, with Headway's key for each.

The table is used only for messages: its names are never accepted as keys. Names are compared without case, dashes and
underscores. A name with a dot is compared with the end of the dotted key, before plain names are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

PER_STEP = ("train.global_batch", "data.seq_len")
"""Keys whose product is the number of tokens per step."""


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Headway's equivalent of a name from another tool.

    `keys`: the closest keys of Headway; empty if there is none. `hint`: sentences for the message; empty if the key has
    the same meaning and unit. `times`: keys whose values, multiplied by the given value, yield the value of `keys[0]`.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    hint: str = ""
    times: tuple[str, ...] = ()


def alias(dotted: str) -> Alias | None:
    """The entry of the table for an unknown key, such as `training.max_steps`; None if there is none."""
    parts = dotted.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((found for end in ends if (found := _by_name().get(fold(end)))), None)


def fold(name: str) -> str:
    """`name` without case, dashes and underscores."""
    return name.lower().replace("_", "").replace("-", "")


@cache
def _by_name() -> dict[str, Alias]:
    return {fold(name): entry for entry in ALIASES for name in entry.names}


def _same(key: str, names: str) -> Alias:
    return Alias(names=tuple(names.split()), keys=(key,))


def _hint(names: str, keys: str, hint: str) -> Alias:
    return Alias(names=tuple(names.split()), keys=tuple(keys.split()), hint=hint)


def _steps(names: str, key: str, unit: str = "steps") -> Alias:
    hint = f"Use {key}: it counts tokens, {unit} x train.global_batch x data.seq_len."
    return Alias(names=tuple(names.split()), keys=(key, *PER_STEP), hint=hint, times=PER_STEP)


def _all(*groups: Iterable[Alias]) -> tuple[Alias, ...]:
    return tuple(entry for group in groups for entry in group)


_MODEL = (
    _same(
        "model.width", "d_model n_embd n_embed hidden_size hidden_dim dim model.dim embed_dim embedding_dim model_dim"
    ),
    _same("model.layers", "n_layer n_layers num_layers num_hidden_layers n_blocks num_blocks depth"),
    _same("model.ffn_width", "intermediate_size d_ff ffn_dim ffn_hidden_size mlp_hidden_size feed_forward_size"),
    _same("model.tied_embeddings", "tie_word_embeddings tie_embeddings weight_tying enable_weight_tying"),
    _same("model.norm_eps", "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon"),
    _same("model.init_std", "initializer_range init_method_std"),
    _hint(
        "vocab_size model.n_vocab n_vocab padded_vocab_size",
        "model.vocab_size",
        "Use model.vocab_size, or leave it out: the data's tokenizer decides.",
    ),
    _same("attention.heads", "n_head n_heads num_heads num_attention_heads num_query_heads n_q_heads"),
    _same(
        "attention.kv_heads", "n_kv_heads n_kv_head num_kv_heads num_key_value_heads n_query_groups num_query_groups"
    ),
    _same("attention.head_dim", "attention.dim head_size d_head d_kv kv_channels dim_head"),
    _same("attention.rope_base", "rope_theta rotary_base rotary_emb_base"),
    _same("attention.rope_fraction", "partial_rotary_factor rotary_pct rotary_percent rotary_percentage"),
    _same("attention.qk_norm", "use_qk_norm qk_layernorm norm_qk"),
    _hint(
        "sliding_window sliding_window_size window_size attention_window use_sliding_window",
        "attention.windows attention.window_pattern",
        "Use attention.windows (tokens that a query sees, its own included) with attention.type gqa; layers that "
        "differ: attention.window_pattern.",
    ),
    _hint(
        "attn_type attention_type architecture architectures model_type model.type flavor model_name",
        "attention.type",
        "Headway has one decoder; attention.type chooses its attention mechanism, the keys of model its size.",
    ),
    _hint(
        "num_experts num_local_experts n_experts moe num_experts_per_tok experts_per_token n_routed_experts "
        "expert_parallel_degree expert_parallel_size ep",
        "attention.type",
        "There are no experts in the MLP and no expert parallelism; attention.type rgqa, gqe, moa, moh, "
        "namoh and switchhead route within attention.",
    ),
    _hint(
        "dropout dropout_p dropout_rate hidden_dropout resid_dropout resid_pdrop embd_pdrop embd_dropout "
        "residual_dropout embed_dropout",
        "model.dropout model.dropout_places",
        "Use model.dropout, and model.dropout_places for where it acts: embedding, branches, hidden, head.",
    ),
    _hint(
        "attn_dropout attention_dropout attn_pdrop dropatt attention_probs_dropout_prob",
        "model.dropout model.dropout_places",
        "There is no dropout of attention weights: kernels draw its masks themselves, so they would depend on the "
        "layout. Leave it out; model.dropout drops the outputs of attention and MLP.",
    ),
    _hint(
        "classifier_dropout drop_path layer_dropout layerdrop",
        "model.dropout",
        "There is no dropout of whole layers or of a classifier; leave it out. Use model.dropout for that of elements.",
    ),
    _hint(
        "bias attention_bias mlp_bias use_bias add_bias_linear qkv_bias",
        "model.mlp_biases attention.biases",
        "Use model.mlp_biases, and attention.biases (types mha, mqa, gqa and sqa).",
    ),
    _hint("lm_head_bias output_bias head_bias use_lm_head_bias", "model.head_bias", "Use model.head_bias."),
    _hint(
        "hidden_act activation activation_function act_fn mlp_type",
        "model.mlp",
        "Use model.mlp: swiglu, geglu, gelu, gelu_tanh or relu.",
    ),
    _hint("norm_type normalization use_rmsnorm layer_norm", "model.norm", "Use model.norm: rmsnorm or layernorm."),
    _hint(
        "rope_scaling use_rope position_embedding_type",
        "model.positions attention.rope_base attention.rope_fraction",
        "Use model.positions: rope, learned, relative_xl, relative_t5 or none; RoPE has attention.rope_base and "
        "rope_fraction.",
    ),
)

_OPTIMIZER = (
    _same("optimizer.lr", "learning_rate lr max_lr peak_lr base_lr max_learning_rate peak_learning_rate"),
    _same("optimizer.weight_decay", "weight_decay wd"),
    _same("optimizer.eps", "adam_eps adam_epsilon optimizer.epsilon eps"),
    _same(
        "optimizer.clip_norm",
        "grad_clip max_grad_norm max_norm clip_grad clip_grad_norm grad_clip_norm gradient_clip_val "
        "gradient_clipping grad_norm_clip gradient_clip",
    ),
    _hint("beta1 adam_beta1", "optimizer.betas", "Use optimizer.betas with both values: [beta1, beta2]."),
    _hint("beta2 adam_beta2", "optimizer.betas", "Use optimizer.betas with both values: [beta1, beta2]."),
    _same("optimizer.betas", "adam_betas adamw_betas betas"),
    _hint(
        "optim optimizer.type optimizer.name optimizer_name optimizer_type optimizer.class_name fused momentum "
        "nesterov",
        "optimizer.lr",
        "The optimizer is AdamW always; the keys of optimizer set its values, such as optimizer.lr.",
    ),
    _hint(
        "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style decay_lr",
        "schedule.type",
        "Use schedule.type: wsd (constant, then linear decay), cosine, linear or inverse_sqrt.",
    ),
    _steps(
        "warmup_steps warmup_iters lr_warmup_steps lr_warmup_iters num_warmup_steps lr_warmup", "schedule.warmup_tokens"
    ),
    Alias(
        names=("warmup_ratio", "warmup_fraction", "warmup_pct", "pct_start"),
        keys=("schedule.warmup_tokens", "train.tokens"),
        hint="Use schedule.warmup_tokens: it counts tokens, the ratio x train.tokens.",
        times=("train.tokens",),
    ),
    _hint(
        "min_lr min_learning_rate eta_min lr_min end_lr",
        "schedule.min_lr_ratio optimizer.lr",
        "Use schedule.min_lr_ratio: the lowest learning rate / optimizer.lr.",
    ),
    _same("schedule.min_lr_ratio", "min_lr_factor min_lr_rate"),
    _same("schedule.decay_fraction", "decay_ratio"),
    _hint(
        "lr_decay_iters lr_decay_steps decay_steps num_decay_steps cooldown_steps",
        "schedule.decay_fraction train.tokens",
        "Use schedule.decay_fraction: the share of train.tokens at the end over which wsd decays; cosine decays "
        "over all.",
    ),
    _hint(
        "label_smoothing label_smoothing_factor ema ema_decay use_ema early_stopping patience",
        "",
        "Headway has nothing of this kind; leave it out.",
    ),
)

_TRAIN = (
    _steps(
        "max_steps steps max_iters num_steps total_steps train_steps train_iters training_steps max_train_steps "
        "iterations num_iterations num_training_steps total_iters iters",
        "train.tokens",
    ),
    _same("train.tokens", "max_tokens total_tokens num_tokens train_tokens training_tokens token_budget"),
    _hint(
        "epochs num_epochs num_train_epochs max_epochs n_epochs train_epochs epoch",
        "train.tokens",
        "There is no key for epochs. Use train.tokens: epochs x training tokens of the dataset, which `headway data "
        "verify CORPUS.yaml` prints; data that is used up is read again in another order.",
    ),
    _hint(
        "batch_size train_batch_size total_batch_size bs batch",
        "train.global_batch train.micro_batch",
        "Use train.global_batch for sequences per optimizer step over all ranks, train.micro_batch for sequences "
        "per forward pass of one rank.",
    ),
    _same("train.global_batch", "global_batch_size effective_batch_size gbs"),
    _same(
        "train.micro_batch",
        "micro_batch_size per_device_train_batch_size per_device_batch_size device_batch_size local_batch_size "
        "train_micro_batch_size_per_gpu per_gpu_batch_size mbs",
    ),
    _hint(
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps gradient_accumulation_iters "
        "accumulate_grad_batches accumulation_steps grad_accumulation_steps",
        "train.global_batch train.micro_batch launch.processes",
        "It follows from others: train.global_batch / (train.micro_batch x data-parallel ranks). Use "
        "train.global_batch, train.micro_batch and launch.processes.",
    ),
    _steps(
        "eval_interval eval_every eval_steps eval_freq eval_iterations val_every val_interval val_freq "
        "val_check_interval validation_freq validation_interval validation.freq validate_every validate_every_steps "
        "test_interval",
        "train.validate_every_tokens",
    ),
    _steps(
        "eval_iters eval_batches val_steps val_batches limit_val_batches max_eval_batches max_eval_steps "
        "validation.steps",
        "train.validation_tokens",
        "batches",
    ),
    _hint(
        "eval_strategy evaluation_strategy do_eval",
        "train.validate_every_tokens",
        "Use train.validate_every_tokens; there is always a validation at the end.",
    ),
    _hint(
        "per_device_eval_batch_size eval_batch_size val_batch_size",
        "train.validation_tokens train.micro_batch",
        "Validation uses train.micro_batch; train.validation_tokens says how much is read.",
    ),
)

_RUN = (
    _steps(
        "save_steps save_interval save_every save_freq checkpoint_interval checkpoint.interval checkpoint_every "
        "checkpointing_steps ckpt_interval save_strategy every_steps",
        "checkpoint.every_tokens",
    ),
    _same("checkpoint.keep", "save_total_limit keep_last_n keep_latest_k keep_last max_checkpoints"),
    _same("checkpoint.keep_best", "load_best_model_at_end save_best keep_best_checkpoint"),
    _hint(
        "resume resume_from resume_from_checkpoint auto_resume init_from load_checkpoint ckpt_path load_path "
        "load_dir initial_load_path initial_checkpoint pretrained checkpoint.load_step checkpoint_path",
        "run_dir init.run init.weights",
        "The same command again continues the run in run_dir. To branch off a checkpoint of another run: "
        "init.run=PATH@STEP. To start from the weights of a run: init.weights=PATH; from others, after "
        "`headway import`: the same.",
    ),
    _same(
        "run_dir",
        "output_dir out_dir save_dir save_folder checkpoint_dir logging_dir log_dir dump_folder exp_dir workdir",
    ),
    _hint("hydra hydra.run.dir", "run_dir", "Hydra is not used; the folder of the run is run_dir."),
    _same("name", "run_name experiment_name exp_name job_name wandb_run_name project_name"),
    _same("seed", "random_seed manual_seed torch_seed training.seed global_seed"),
    _same("data.seed", "data_seed shuffle_seed dataloader_seed"),
    _same(
        "tracking.log_every_steps", "logging_steps log_interval log_freq log_every log_every_n_steps logging_interval"
    ),
    _hint(
        "report_to logger loggers tracker trackers comet neptune aim clearml",
        "tracking.tensorboard tracking.wandb tracking.mlflow",
        "Records are shown in TensorBoard (tracking.tensorboard), W&B (tracking.wandb) and MLflow (tracking.mlflow); "
        "every run has its values in metrics.jsonl too.",
    ),
    _hint(
        "wandb use_wandb enable_wandb wandb_log",
        "tracking.wandb",
        "Use tracking.wandb, as tracking.wandb.project=NAME.",
    ),
    _hint(
        "mlflow use_mlflow enable_mlflow",
        "tracking.mlflow",
        "Use tracking.mlflow, as tracking.mlflow.uri=https://HOST.",
    ),
    _same("tracking.wandb.project", "wandb_project project"),
    _same("tracking.wandb.entity", "wandb_entity wandb_team"),
    _same("tracking.wandb.mode", "wandb_mode"),
    _same("tracking.wandb.group", "wandb_group wandb_run_group"),
    _same("tracking.mlflow.uri", "mlflow_uri mlflow_tracking_uri tracking_uri"),
    _same("tracking.mlflow.experiment", "mlflow_experiment mlflow_experiment_name"),
    _hint(
        "experiment",
        "name tracking.mlflow.experiment",
        "Use name for the name of a run, and tracking.mlflow.experiment for an experiment of MLflow.",
    ),
    _hint(
        "wandb_api_key wandb.api_key wandb.key wandb.token mlflow_tracking_token mlflow_tracking_password mlflow.token "
        "mlflow.password mlflow.username mlflow_tracking_username",
        "tracking.wandb tracking.mlflow",
        "Specs are copied into run folders, so keys of trackers stand in none. Set WANDB_API_KEY, or "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment of the command.",
    ),
    _same("tracking.tensorboard", "use_tensorboard enable_tensorboard tensorboard_dir tensorboard_log"),
)

_DATA = (
    _same(
        "data.seq_len",
        "block_size max_seq_len max_seq_length seq_length sequence_length context_length context_size ctx_len n_ctx "
        "max_length max_position_embeddings n_positions model_max_length sequence_len",
    ),
    _hint(
        "dataset dataset_name dataset_path dataset_config data_dir data_path data.path train_data train_file "
        "train_files train_dataset data_files data.train_path",
        "data.source",
        "Text becomes shards first: `headway data build CORPUS.yaml`; then data.source: {type: mds, path: "
        "datasets/NAME}.",
    ),
    _hint(
        "tokenizer tokenizer_path tokenizer_name tokenizer_dir tokenizer_type tokenizer_name_or_path hf_assets_path",
        "data.source",
        "The tokenizer belongs to the dataset: `headway data build CORPUS.yaml` trains one or takes a tokenizer.json.",
    ),
    _same("data.workers", "num_workers dataloader_num_workers num_data_workers"),
    _same("data.prefetch", "prefetch_factor dataloader_prefetch_factor"),
    _hint(
        "shuffle shuffle_buffer shuffle_buffer_size packing group_texts",
        "data.seed data.shuffle_window",
        "Data is always packed, and shuffled by data.seed within data.shuffle_window shards.",
    ),
)

_PARALLEL = (
    _same(
        "parallel.tensor",
        "tensor_parallel_degree tensor_parallel_size tensor_model_parallel_size tensor_parallel tp tp_size "
        "tp_degree model_parallel_size autotp_size",
    ),
    _same(
        "parallel.pipeline",
        "pipeline_parallel_degree pipeline_parallel_size pipeline_model_parallel_size pp pp_size pp_degree "
        "pipeline_parallel pipeline_stages",
    ),
    _same(
        "parallel.context",
        "context_parallel_degree context_parallel_size context_parallel cp cp_size cp_degree sequence_parallel_size "
        "ulysses_degree ulysses_size sp_size",
    ),
    _hint(
        "dp dp_size dp_degree data_parallel data_parallel_size data_parallel_degree data_parallel_replicate_degree ddp",
        "launch.processes parallel.tensor parallel.pipeline parallel.context",
        "It follows from others: processes of all hosts (launch.processes) / (parallel.tensor x parallel.pipeline x "
        "parallel.context).",
    ),
    _hint(
        "data_parallel_shard_degree dp_shard fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap sharding_strategy "
        "strategy use_distributed_optimizer",
        "parallel.zero",
        "Use parallel.zero: 1 shares optimizer states over all data-parallel ranks, 2 gradients too, 3 parameters too.",
    ),
    _same(
        "parallel.zero", "zero_stage zero zero_level zero_optimization zero_optimization.stage zero_optimization_stage"
    ),
    _same(
        "parallel.overlap",
        "overlap_comm zero_optimization.overlap_comm overlap_grad_reduce overlap_param_gather overlap_communication "
        "overlap_grad_reduction",
    ),
    _hint(
        "deepspeed deepspeed_config ds_config",
        "parallel.zero",
        "Headway writes DeepSpeed's configuration itself, from parallel.zero and other keys of the spec.",
    ),
    _hint(
        "cpu_offload offload offload_optimizer offload_param",
        "parallel.zero parallel.recompute",
        "There is no offloading; parallel.zero 3 and parallel.recompute block save the most memory.",
    ),
    _same("launch.hosts", "nnodes num_nodes nodes num_machines num_hosts"),
    _hint(
        "nproc_per_node num_gpus n_gpus gpus ngpu gpus_per_node devices num_processes nproc world_size n_devices",
        "launch.processes launch.hosts launch.slurm.gpus_per_node",
        "Use launch.processes: processes (GPUs) per host; launch.hosts is the number of hosts. What a Slurm job "
        "asks for is launch.slurm.gpus_per_node.",
    ),
    _same("launch.address", "master_addr main_process_ip rdzv_endpoint"),
    _same("launch.port", "master_port main_process_port"),
    _same("launch.device", "accelerator use_cpu no_cuda device"),
    _hint(
        "backend dist_backend ddp_backend",
        "launch.device",
        "It follows from launch.device: NCCL for cuda, gloo for cpu.",
    ),
    _hint(
        "precision dtype torch_dtype mixed_precision mixed_precision_param param_dtype amp autocast",
        "parallel.precision",
        "Use parallel.precision: fp32, or bf16 (keeps fp32 master weights).",
    ),
    _hint("bf16 use_bf16 bfloat16", "parallel.precision", "Use parallel.precision: bf16 (keeps fp32 master weights)."),
    _hint(
        "fp16 float16 half use_fp16 loss_scale grad_scaler fp16_opt_level fp8 tf32 allow_tf32 load_in_8bit int8",
        "parallel.precision",
        "Headway trains in fp32 or bf16 alone; use parallel.precision.",
    ),
    _hint(
        "gradient_checkpointing activation_checkpoint activation_checkpointing use_activation_checkpointing ac_mode "
        "remat activation_checkpoint.mode recompute_activations recompute_granularity selective_ac_option "
        "enable_checkpointing",
        "parallel.recompute",
        "Use parallel.recompute: none, selective or block (a whole block).",
    ),
    _hint(
        "compile torch_compile use_compile compile_model training.compile",
        "speed.compile",
        "Use speed.compile: auto, none, elementwise or block; the whole model is never compiled.",
    ),
    _hint(
        "attn_implementation flash_attention flash_attn use_flash_attn use_flash_attention use_flash flash "
        "flash_attention_2 sdpa attn_impl sdp_backend",
        "speed.attention",
        "Use speed.attention: auto, cudnn, flash, fa3 or math.",
    ),
    _hint(
        "liger use_liger use_liger_kernel apply_liger_kernel",
        "speed.norm speed.loss",
        "Use speed.norm: liger and speed.loss: liger.",
    ),
)

ALIASES: tuple[Alias, ...] = _all(_MODEL, _OPTIMIZER, _TRAIN, _RUN, _DATA, _PARALLEL)
