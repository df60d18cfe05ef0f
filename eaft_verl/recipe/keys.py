"""Which keys a configuration has: verl's that act here, those set elsewhere, and why the others are not taken."""

from eaft_verl.recipe.verl_keys import OURS_INSTEAD as GRPO_INSTEAD

VERL_TREE = "sft_trainer_engine"
# verl's keys this trainer reads; the others of its SFT tree would be accepted and ignored, so they are not in ours.
VERL_KEYS: dict[str, tuple[str, ...]] = {
    "data": ("train_batch_size", "micro_batch_size_per_gpu", "max_token_len_per_gpu", "use_dynamic_bsz"),
    "trainer": (
        *("total_epochs", "total_training_steps", "save_freq", "test_freq", "max_ckpt_to_keep"),
        *("balance_batch", "nnodes", "n_gpus_per_node"),
    ),
}
OURS_INSTEAD = {
    **GRPO_INSTEAD,
    "verl.model.path": "model",
    "verl.data.train_files": "data.train",
    "verl.data.val_files": "data.heldout",
    "verl.data.max_length": "data.max_length",
    "verl.data.truncation": "data.over_long",
    "verl.data.train_max_samples": "data.rows",
    "verl.data.val_max_samples": "data.heldout_rows",
    "verl.trainer.seed": "seed",
    "verl.engine.seed": "seed",
    "verl.optim.total_training_steps": "verl.trainer.total_training_steps",
    "verl.trainer.device": "device",
    "verl.trainer.default_local_dir": "output",
}
OPEN_KEYS = frozenset(  # dictionaries whose keys somebody else defines
    (
        "objective",
        "choose",
        "meter",
        "data.columns",
        "data.chat_template_kwargs",
        "evaluate.drift",
        "evaluate.backend_args",
        "verl.model.override_config",
        "verl.engine.mixed_precision",
        "verl.optim.override_optimizer_config",
        "verl.actor_rollout_ref.rollout.engine_kwargs.vllm",
    )
)
TEXT_KEYS = frozenset(("name", "model", "output", "compare.to"))  # null by default
SOURCE_KEYS = frozenset(("data.train", "data.heldout"))  # text, or a mapping or list of sources
FREE_KEYS = frozenset(  # several kinds are right; `checks` looks at them where they matter
    (
        *("verl.trainer.save_freq", "verl.trainer.test_freq", "verl.trainer.max_ckpt_to_keep"),
        *("verl.model.target_modules", "verl.model.use_shm", "verl.engine.model_dtype"),
    )
)
ENGINE_OF_GRPO = (  # keys of verl.engine that act where verl computes entropies itself
    *("entropy_from_logits_with_chunking", "entropy_from_logits_chunk_size", "entropy_checkpointing"),
    "use_torch_compile",
)
GRPO_ONLY = (
    *("verl.actor_rollout_ref", "verl.algorithm", "verl.reward", "verl.data.max_response_length"),
    *("verl.data.max_prompt_length", *(f"verl.engine.{key}" for key in ENGINE_OF_GRPO)),
)
PARTS = {"verl.engine.qat": ("_target_", "enable"), "verl.model.mtp": ("_target_", "enable")}  # both are refused
WITHOUT_EFFECT = {  # of verl's SFT tree, what its FSDP2 engine never reads here, or what would act on a part only
    "verl.model.trust_remote_code": "code that comes with a model is never run; use an architecture transformers knows",
    "verl.model.custom_chat_template": "data are encoded by the tokenizer's own chat template; change it there",
    "verl.model.lora": "it is Megatron's; set verl.model.lora_rank, lora_alpha and target_modules",
    "verl.model.fused_kernel_options": "fused kernels hide the logits and are not used",
    "verl.model.tiled_mlp": "verl's FSDP engine does not read it",
    "verl.engine.wrap_policy.min_num_params": "it belongs to FSDP1; set verl.engine.wrap_policy.disable",
    "verl.engine.wrap_policy.transformer_layer_cls_to_wrap": "the layers are the model's own; set wrap_policy.disable",
    "verl.engine.use_orig_params": "it belongs to FSDP1; verl.engine.strategy is fsdp2",
    "verl.engine.pad_to_length_bucket": "verl.engine.pad_to_length is not used",
    "verl.engine.dtype": "verl's FSDP engine does not read it; set verl.engine.mixed_precision.param_dtype",
    "verl.engine.turbo_config": "it belongs to another engine",
    "verl.optim.warmup_style": "it is an old name of verl.optim.lr_scheduler_type",
}
