"""What a user means by a key that does not exist: the words of this field and of other trainers."""

# A word that other trainers and papers use for a key: what to write here. Words are compared without "_" and "-".
_WORDS = {
    "lb": "lb_weight load_balance load_balancing load_balancing_weight load_balance_weight aux_loss aux_loss_weight "
    "aux_loss_coef aux_loss_alpha router_aux_loss_coef balance_loss balance_weight lbl lbl_weight",
    "z": "z_loss z_loss_weight router_z_loss router_z_loss_weight z_loss_coef",
    "capacity": "cf capacity_factor capacity_limit expert_capacity moe_capacity_factor",
    "router.k": "k top_k topk num_experts_per_tok num_experts_per_token experts_per_token moe_top_k",
    "router.temp, with router=temperature or router=gumbel": "temp temperature tau router_temperature",
    "noise": "jitter router_jitter jitter_noise router_jitter_noise noise_std sigma noise_scale",
    "drop": "drop_policy drop_tokens",
    "optimizer.muon_lr for matrices and optimizer.adamw_lr for the rest": "lr learning_rate base_lr max_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.warmup, a fraction of the steps": "warmup warmup_steps warmup_ratio",
    "optimizer.clip": "clip grad_clip max_grad_norm gradient_clipping",
    "steps": "epochs num_epochs num_train_epochs max_steps num_steps train_steps iterations iters max_iters",
    "batch_size": "batch bs micro_batch micro_batch_size per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps grad_acc accumulation gradient_accumulation",
    "eval_every": "eval_interval eval_steps evaluate_every",
    "save_every": "save_steps save_interval checkpoint_every",
    "seed": "seeds random_seed",
    "precision": "dtype bf16 fp16 amp mixed_precision torch_dtype",
    "model.num_experts": "num_experts n_experts experts num_local_experts n_routed_experts",
    "model.experts_by_layer, such as 0-2:4": "layer_experts experts_per_layer num_experts_by_layer expert_counts",
    "model.shared_experts": "shared_experts n_shared_experts num_shared_experts",
    "model.routers, such as 0-2:hash": "router.layers routers router_layers layer_routers router_by_layer",
    "model.shared_gate": "shared_expert_gate use_shared_expert_gate moe_shared_expert_gate",
    "model.latent_dim": "latent latent_size moe_latent_size moe_latent_dim",
    "model.dim": "dim hidden_size d_model n_embd embed_dim width",
    "model.ffn": "ffn ffn_dim d_ff intermediate_size moe_intermediate_size expert_dim",
    "model.layers": "layers n_layers num_layers n_layer num_hidden_layers depth",
    "model.heads": "heads n_heads num_heads n_head num_attention_heads",
    "model.dropout": "dropout",
    "data.seq_len": "seq_len sequence_length block_size context_length max_length max_seq_len ctx",
    "data.tokenizer": "tokenizer tokenizer_name",
    "data.vocab_size": "vocab_size vocab",
    "data.source.paths, with data=text": "data.paths data.path data.files path paths files text dataset data_dir "
    "train_file",
    "out": "output_dir out_dir output save_dir log_dir",
    "logger.mode": "wandb use_wandb wandb_mode",
    "logger.project": "project wandb_project",
    "logger.to": "report_to log_with loggers tensorboard use_tensorboard csv",
    "logger.log_model": "log_model wandb_log_model log_artifact artifact",
    "threads": "num_threads n_threads workers num_workers cpus",
    "CUDA_VISIBLE_DEVICES= in front of the command to stay on the CPU; a GPU is used if there is one": "device gpu "
    "cuda gpus cpu",
}
HINTS = {word.replace("_", ""): key for key, words in _WORDS.items() for word in words.split()}


def hint(key: str) -> str | None:
    """Return what to write instead of an unknown key, such as "lb" for "load_balancing_weight"; None if unknown.

    The key may have the group of another one in front, such as router.temperature.
    """
    spelled = [key, key.rpartition(".")[2]]
    return next(
        (HINTS[word] for each in spelled if (word := each.lower().replace("_", "").replace("-", "")) in HINTS), None
    )
