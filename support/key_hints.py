"""
What an error says of a name that is no key: the key that was meant, if one can tell.

Users of other trainers type the names that they know: those of TRL and of the Trainer of transformers
(`learning_rate`), of verl (`data.train_batch_size`, `rollout.n`), of nanoGPT (`max_iters`). ELSEWHERE lists
the names that mean one of our keys. INSTEAD has a sentence for those that mean none, several, or nearly one.

Simpler than accepting them: a config has one name for one thing. What it does not do: translate values, such
as a batch size per device into one over all devices.
"""
import difflib
import re

ELSEWHERE = {   # our key: its names elsewhere
    # models, problems, folders
    'student': 'model model_name model_name_or_path student_model student_model_name_or_path',
    'teacher': 'teacher_model teacher_model_name_or_path ref_model',
    'data': 'dataset dataset_name train_dataset train_data train_file train_files',
    'eval_data': 'eval_dataset validation_file val_files test_data',
    'out_dir': 'output_dir default_local_dir',
    'max_prompt_tokens': 'max_prompt_length',
    'dtype': 'torch_dtype precision',
    'seed': 'random_seed data_seed',
    # rollout
    'prompts_per_step': 'batch_size train_batch_size global_batch_size',
    'n': 'num_generations num_return_sequences num_samples group_size',
    'max_new_tokens': 'max_completion_length max_response_length response_length max_tokens',
    # objective
    'oprd_weight': 'mu',
    'opd_k': 'kl_top_k distillation_topk',
    # update
    'steps': 'max_steps max_iters num_steps train_steps total_training_steps',
    'lr': 'learning_rate',
    'schedule': 'lr_scheduler lr_scheduler_type',
    'warmup': 'warmup_ratio lr_warmup_steps_ratio',
    'beta1': 'adam_beta1',
    'beta2': 'adam_beta2',
    'adam_eps': 'adam_epsilon',
    'grad_clip': 'max_grad_norm gradient_clipping clip_grad',
    'checkpointing': 'gradient_checkpointing enable_gradient_checkpointing activation_checkpointing',
    'compile': 'torch_compile',
    # evaluation and saving
    'temperature': 'temp sampling_temperature',
    'eval_every': 'eval_steps eval_interval eval_freq test_freq',
    'save_every': 'save_steps save_interval save_freq',
    'keep': 'save_total_limit',
    'report': 'report_to logger',
    'profile': 'profiler torch_profiler',
    'timeout': 'ddp_timeout nccl_timeout',
    'log_every': 'logging_steps log_interval log_freq',
}
INSTEAD = {     # names elsewhere: what to do
    'per_device_train_batch_size gradient_accumulation_steps mini_batch_size ppo_mini_batch_size '
    'micro_batch_size ppo_micro_batch_size_per_gpu':
        'give prompts_per_step=, over all ranks; token_budget= cuts it into micro-batches by itself',
    'per_device_eval_batch_size': 'give eval_rows=, the answers that are sampled at once on a rank',
    'num_train_epochs total_epochs num_epochs epochs': 'give steps=; a step takes prompts_per_step= problems',
    'warmup_steps warmup_iters': 'give warmup=, a share of the steps',
    'min_lr_ratio min_lr_rate': 'give min_lr=, a share of lr',
    'bf16 fp16': 'give dtype=bfloat16',
    'max_length max_seq_length max_model_len block_size': 'give max_prompt_tokens= and max_new_tokens=',
    'beta': 'give oprd_weight= (mu of Eq. 7), kl_direction= (reverse or forward), or beta1= of AdamW',
    'kl_coef kl_loss_coef': 'give opd_weight=',
    'loss_type loss_fn': 'give rep_loss= or opd=',
    'lmbda': 'all answers are the student\'s own here, so there is no such key',
    'resume_from_checkpoint resume': 'give the out_dir= of the run, and it resumes',
    'init_from path': 'give student= or teacher=, a folder or hub id',
    'lora peft use_peft lora_r': 'all weights are trained, so there is no such key',
    'wandb_log use_wandb wandb': 'give report=wandb',
    'tensorboard': 'give report=tensorboard',
    'use_vllm': 'rollout.py samples, so there is no such key',
    'optim optimizer': 'the optimizer is AdamW, so there is no such key',
    'fsdp deepspeed nnodes num_processes nproc_per_node n_gpus_per_node': 'start it with torchrun',
    'config config_file': 'give the path alone: configs/toy.py',
}


def by_name(table):
    """{name: what the table has for it}, one entry for each name."""
    return {name: value for names, value in table for name in names.split()}


SAME = by_name((names, key) for key, names in ELSEWHERE.items())         # {name elsewhere: our key}
SENTENCES = by_name(INSTEAD.items())                                     # {name elsewhere: what to do}


def hint(name, keys, script=''):
    """A sentence for a name that no key has: which key was meant, or what to do instead.

    keys: those that the script reads; without a script, all. A key that it does not read is not offered.
    """
    # verl writes data.train_batch_size: what stands behind the last dot says what it is.
    plain = str(name)[-60:].lower().replace('-', '_').rpartition('.')[2]
    unknown = f'{script} has no key for it; see --help' if script else 'see --help for all keys'
    if plain in SENTENCES:
        named = re.findall(r'(\w+)=', SENTENCES[plain])
        return SENTENCES[plain] if set(named) <= set(keys) else unknown

    # The same word in another form, another trainer's word, a misspelt word of ours or of theirs.
    meant = plain if plain in keys else SAME.get(plain)
    if not meant:
        near = difflib.get_close_matches(plain, [*keys, *SAME], 1)
        if not near:
            return 'see --help for all keys'
        meant = SAME.get(near[0], near[0])
    if meant not in keys:
        meant = relative(meant, keys)
    return f'did you mean {meant!r}?' if meant else unknown


def relative(key, keys):
    """A key -> its relative among `keys`, or None: what training calls n is eval_n in an evaluation,
    and lr is bridge_lr in a fit."""
    for other in (f'eval_{key}', f'bridge_{key}', key.removeprefix('eval_')):
        if other != key and other in keys:
            return other
    return None


def unread(key, script, reads):
    """The error line for a key that this script does not read. reads: {script: its keys}."""
    other = relative(key, reads[script])
    if other:
        return f'{script} does not read {key}=; did you mean {other}=?'
    readers = ' and '.join(other for other, keys in reads.items() if key in keys)
    return f'{script} does not read {key}=, a key of {readers}; leave it out, or see --help'
