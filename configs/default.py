"""
Every key there is, with its meaning, its unit and the paper's default (arXiv 2606.06021, section 4.1).
A config file says only what differs:

    from configs.default import config
    config = config | dict(lr=2e-3, steps=100)

`checks`, below, holds what each key may be, and `reads` which script reads it; load_config enforces both. The
--help of a script is made of this file: the keys that it reads, with the comments beside them, under the
headings of their sections.
"""
config = dict(
    # run
    out_dir='out/run',          # folder of this run: config, log, checkpoints, figure
    seed=0,                     # of everything random: toy models, prompt order, every sampled token
    device='auto',              # 'auto' (CUDA, else CPU), 'cuda', 'cpu', 'mps'
    dtype='auto',               # of forwards: 'auto' (bfloat16 on CUDA, else float32), 'bfloat16', 'float32';
                                # weights, gradients and optimizer state are float32
    dry_run=False,              # --dry-run: resolve, check, print the plan, memory, disk and time, stop
    report='',                  # log to a tracker too: 'wandb', 'tensorboard', or 'wandb,tensorboard'
                                # (support/trackers.py)
    profile=False,              # --profile: trace the second and third step of this start, with their memory,
                                # into out_dir/profile (support/profile.py)
    ranks=0,                    # of a dry run: estimate for so many ranks, GPUs unless device= says cpu;
                                # 0 = those that it was started with
    shard_ranks=0,              # ranks that share one copy of the student's weights, gradients and moments, a
                                # divisor of all ranks; 0 = those of one machine
    teacher_shard=False,        # share the teacher's weights likewise, for one that does not fit on a GPU:
                                # each of its blocks is gathered when it is needed
    timeout=60.0,               # minutes that ranks wait for each other before the run ends with a message

    # models and problems: local, or a hub id (owner/name, owner/name@revision); studies/toy.py makes 'toy'
    student='',                 # Hugging Face folder or id; this one is trained
    teacher='',                 # Hugging Face folder or id; frozen. 'self': the initial student.
                                # Several with commas between: extensions/several_teachers.py
    data='',                    # training problems: a file (.parquet, .arrow, .jsonl, .json, .csv, .tsv,
                                # .txt, .gz), a folder, a data set's id, or several with commas; docs/data.md
    eval_data='',               # held-out problems: files, folders or ids like those of data=, each a set of
                                # its own, or by name: aime24, aime25, aimo, amc23, math500 (eval_math.py);
                                # '' = no evaluation; docs/data.md
    max_prompt_tokens=1024,     # training prompts of more tokens are left out; 0 = none
    enable_thinking=True,       # what chat templates that know the word (Qwen3) are told
    date='',                    # the day that chat templates are told is today, YYYY-MM-DD; '' = the day on
                                # which the run was started

    # several teachers, and the student as its own (section 5 of the paper)
    teacher_share='data',       # which of several teachers reads the answers to a prompt: that of its set in
                                # 'data'; that of its 'tag', the number in its column `teacher`, from 1; or
                                # one at random, with weights such as [3,1]
    teachers_in_turn=False,     # keep one of several teachers at a time on the GPU, the others on the host
    teacher_sees='prompt',      # before an answer the teacher reads the student's 'prompt', or one with the
                                # problem's 'solution' in view (extensions/self_teacher.py)
    solution_text='{question}\n\nSolution:\n{solution}\n\nSolve it in your own words.',    # this prompt
    teacher_every=0,            # every so many steps teacher='self' is updated from the student; 0 = never
    teacher_decay=0.0,          # teacher <- decay * teacher + (1 - decay) * student: 0 = a copy; 0.99 with
                                # teacher_every=1 = a moving average

    # rollout: the student's own answers (section 4.1.1)
    answers_by='student',       # who writes them. Off-policy controls: 'teacher', or 'solution': those of the
                                # problem set
    prompts_per_step=8,         # prompts of a step, over all ranks
    n=2,                        # answers per prompt
    max_new_tokens=16384,       # longest answer, tokens; one that is cut here is supervised and graded like
                                # the others, and does not count as finished
    temperature=1.0,            # 1 = the student's own distribution, as Eq. (2) wants; 0 = greedy
    top_k=0,                    # sample among the k likeliest tokens; 0 = all
    top_p=1.0,                  # sample among the smallest set with this much probability; 1 = all

    # objective, Eq. (7): opd_weight * (one of Eqs. 3-5) + oprd_weight * Eq. (6). A weight is a number, or
    # knots [[share of the run, weight], ...] with straight lines between: [[0, 1], [0.7, 1], [0.7, 0]] jumps
    oprd_weight=1.0,            # of Eq. (6); the mu of Eq. (7)
    opd_weight=0.0,             # of the output-space term; 0 = LM heads are looked at now and then only
    reward_weight=0.0,          # of the reward term, added to Eq. (7) (extensions/rewards.py)
    reward_scale=True,          # divide advantages by the standard deviation of the rewards of a prompt's
                                # n answers (GRPO); False = do not (as in Dr. GRPO)
    attention_weight=0.0,       # of the attention term, added to Eq. (7) (extensions/attention_maps.py)
    attention_layers='last',    # student layers whose maps are compared; as `layers`
    attention_heads='all',      # heads that are compared: 'all', or a list counted from 1

    # Eq. (6), hidden states
    rep_loss='mse',             # a distance in losses.py: 'mse' (the paper), 'nmse' (both sides are
                                # L2-normalised: the authors' code; off at their commit 6a2026f),
                                # 'cosine' (1 - cos = d/2 times nmse: the scale-free form to use with AdamW)
    layers='all',               # student layers to match: 'all', 'last', 'even', 'odd', or a list such as
                                # [1,14,28], counted from 1; layer L is the final-normed state. The authors
                                # count blocks from 0: their 'even' is our 'odd'
    positions='last_k',         # response positions of both terms: 'all', 'last', the name of one of the next
                                # four, or 'drift' (all; Eq. 6 weighs each by its own share of the distance)
    last_k=2000,                # the last k positions (the paper)
    first_k=2000,               # the first k positions
    last_frac=0.3,              # this last share of each answer, at least one position
    first_frac=0.3,             # this first share of each answer, at least one position
    position_offset=0,          # hidden states are compared 0: where the model predicts y_t (the paper), or
                                # 1: one column later, where it has read y_t (the authors' code)
    loss_average='sequence',    # 'sequence': mean over each answer, then over answers (Eq. 6);
                                # 'token': mean over all supervised tokens (the authors' code)

    # Eqs. (3)-(5), output space
    opd='topk',                 # 'sampled' (3), 'full' (4), 'topk' (5), or 'byte': KL over the next byte, for
                                # any two tokenizers; 'supervised': -log p of the answers, a control
    opd_k=16,                   # tokens in the support S of 'topk'
    opd_support='student',      # S: the likeliest tokens of 'student' (5), 'teacher', or their 'union'
    opd_tail='reward',          # 'reward': a token of S earns p (renormalised on S) * (log p - log q)
                                # (4.1.1, the authors' code); 'renorm': KL of p and q renormalised on S (5);
                                # 'bucket': KL with all tokens outside S as one more outcome
    kl_direction='reverse',     # 'reverse' KL(p || q) (the paper), 'forward' KL(q || p)
    student_temperature=1.0,    # the student's in the loss, and in the logged KL; the sampler has its own
    teacher_temperature=1.0,    # the teacher's
    opd_future=False,           # 'sampled': weigh a token with its answer's log-ratios from there on
    opd_baseline=False,         # 'sampled': subtract the exact KL there; less variance, same mean
    head_rows=0,                # rows under the LM heads at once; 0 = 64, on CUDA 1024: enough for the matrix
                                # units to be the limit, and 2.5 GB of logits (V = 151,936)

    # other widths, depths and tokenizers (section 3.3): bridge.py finds an interface between two models
    bridge='',                  # folder that bridge.py writes (stage 1) and distill.py reads; '' = Eq. (6)
    layer_map='depth',          # teacher layer of each student layer: 'depth' (11), 'cka' (bridge.py looks
                                # for the most alike states), 'kept' (those that a pruned student has kept,
                                # as its config.json says: studies/damage.py), or a list, one for each of
                                # `layers`
    bridge_rank=0,              # rank r of the interface; 0 = the one Theorem 3 recommends
    bridge_normalise=True,      # L2-normalise both projections (3.3.3); False = Eq. (14) to the letter
    pair='floor',               # teacher with another vocabulary: a position takes the teacher's last state
                                # that has read no more bytes; 'exact': only where both have read the same
    teacher_ids='text',         # 'student': the teacher is fed the student's ids, gibberish to it, as the
                                # authors' code does; only to reproduce the published setting
    bridge_prompts=2000,        # problems answered by the student for the fit
    bridge_held_out=0.1,        # share of them kept for judging
    bridge_fit='ridge',         # 'ridge': closed form, every rank at once; 'adamw': 20 epochs (Algorithm 1);
                                # controls: 'random' P_S, or 'shuffled' pairs
    bridge_ridge=1e-4,          # penalty, as a share of the student states' variance
    bridge_bias=True,           # centre the student's side; False = Eq. (13) to the letter
    bridge_lr=3e-2,             # of 'adamw' (the authors' code: 1e-4): the best of five on the toy

    # update: AdamW
    steps=500,                  # optimizer steps
    lr=1e-5,                    # peak learning rate
    schedule='cosine',          # after warm-up: 'cosine' or 'linear' down to min_lr, or 'constant'
    warmup=0.03,                # share of the steps spent rising linearly from 0
    min_lr=0.0,                 # where the schedule ends, as a share of lr
    beta1=0.9,                  # AdamW
    beta2=0.999,
    adam_eps=1e-8,              # added to the root mean square of a gradient; gradients of nmse lie below it
    weight_decay=0.01,          # on matrices only, never on norms and biases
    grad_clip=1.0,              # largest gradient norm; 0 = no clipping
    token_budget=32768,         # tokens of a micro-batch, padding included; changes memory, never the update
    checkpointing=False,        # recompute each block in the backward: less memory, a third more time
    compile=False,              # torch.compile the blocks, for training; more memory if they are recomputed

    # evaluation and saving
    eval_every=50,              # steps between evaluations; 0 = only before and after
    eval_n=16,                  # answers per problem: Avg@n, Best@n
    eval_problems=0,            # first so many problems of eval_data; 0 = all
    eval_suffix='',             # added to each question of eval_data that is a bare text; '' = for sets given
                                # by name their instruction to answer in \boxed{}, for others nothing
    eval_temperature=0.7,       # the paper's
    eval_top_p=1.0,             # the authors' scripts use 0.95
    eval_max_new_tokens=0,      # longest answer, tokens; 0 = the config's max_new_tokens (authors: 31744)
    eval_teacher=True,          # also the teacher, before the first step: it needs whole weights for that
    regrade=False,              # --regrade: eval_math.py grades the answers that are there once more
    eval_rows=64,               # answers sampled at once on a rank; 64 of 16k tokens: 30 GB of cache at 1.5B
    eval_show=1,                # how many answers of an evaluation are printed, each to another problem; the
                                # run folder has them all
    save_every=50,              # steps between checkpoints; the best evaluation so far is one too
    keep=2,                     # how many of the newest checkpoints stay, beside the best
    diagnose_every=10,          # steps between looks at what the objective leaves out: KL, entropies, top-16
                                # overlap, cosines; 0 = at the first and the last step
    diagnose_rows=512,          # how many positions such a look at the vocabulary takes, about
    log_every=1,                # steps between lines on the terminal; log.jsonl has every step

    # the toy (studies/toy.py): chains of arithmetic modulo 10, with models trained here from nothing
    toy_dir='out/toy_models',   # made once per recipe, then reused
    toy_ops=6,                  # operations in a problem
    toy_layers=4,               # depth L of student and teacher
    toy_width=96,               # width d
    toy_heads=4,                # attention heads
    toy_batch=64,               # sequences of a supervised step
    toy_student_steps=200,      # supervised steps that make the student
    toy_teacher_steps=160,      # further ones, from the student, that make the teacher
    toy_teacher_layers=0,       # 0 = the student's network, trained on; else another, from its own start
    toy_teacher_width=0,        # likewise
    toy_teacher_tokens='same',  # 'merged': likewise, with another vocabulary for the same text
    toy_hints=0.0,              # share of the supervised steps whose prompts show the worked answer; most of
                                # these steps' answers have a slip, from which they go on
    toy_halves=False,           # two teachers, one for sums and one for products, each with its own problems
    toy_teacher_half='both',    # which of them teach: 'both', or 'sums' or 'products' alone, for all problems
    toy_student_lr=2e-3,        # peak learning rates, 5% warm-up, cosine to 5%
    toy_teacher_lr=1.5e-3,
    toy_train=4096,             # training problems
    toy_eval=128,               # held-out problems
)

# What each key may be: (low, high) for numbers, or a tuple of allowed words and types. Every number has both
# bounds, far beyond any real use: a larger one would run for days, fill the memory or overflow before any
# message. Texts that are not listed may be anything (rep_loss: a name in losses.DISTANCES).
positive, natural, share = (1, 10**7), (0, 10**7), (0, 1)
checks = dict(
    seed=(0, 2**63 - 1), device=('auto', 'cuda', 'cpu', 'mps'), dtype=('auto', 'bfloat16', 'float32'),
    ranks=(0, 65536), shard_ranks=(0, 65536), timeout=(0.01, 10**5), max_prompt_tokens=natural,
    prompts_per_step=(1, 10**5), n=(1, 10**4), max_new_tokens=positive,
    temperature=(0, 1e3), top_k=natural, top_p=(1e-6, 1),
    teacher_share=('data', 'tag', list), teacher_sees=('prompt', 'solution'), teacher_every=natural,
    teacher_decay=(0, 0.999999),
    layers=('all', 'last', 'even', 'odd', list),
    positions=('all', 'last', 'last_k', 'first_k', 'last_frac', 'first_frac', 'drift'),
    last_k=positive, first_k=positive, last_frac=(1e-6, 1), first_frac=(1e-6, 1),
    position_offset=(0, 1), loss_average=('sequence', 'token'), oprd_weight=(0, 1e6, list),
    opd_weight=(0, 1e6, list), reward_weight=(0, 1e6, list), attention_weight=(0, 1e6, list),
    attention_layers=('all', 'last', 'even', 'odd', list), attention_heads=('all', list),
    opd=('sampled', 'full', 'topk', 'byte', 'supervised'), answers_by=('student', 'teacher', 'solution'),
    opd_k=positive, opd_support=('student', 'teacher', 'union'),
    opd_tail=('reward', 'renorm', 'bucket'), kl_direction=('reverse', 'forward'), head_rows=natural,
    student_temperature=(1e-3, 1e3), teacher_temperature=(1e-3, 1e3),
    diagnose_every=natural, diagnose_rows=positive,
    layer_map=('depth', 'cka', 'kept', list), pair=('floor', 'exact'), teacher_ids=('text', 'student'),
    bridge_rank=natural, bridge_prompts=(2, 10**7), bridge_held_out=(1e-6, 0.9), bridge_ridge=(0, 1e3),
    bridge_fit=('ridge', 'adamw', 'random', 'shuffled'), bridge_lr=(0, 10),
    steps=positive, lr=(0, 10), schedule=('cosine', 'linear', 'constant'), warmup=share, min_lr=share,
    beta1=(0, 0.9999), beta2=(0, 0.99999), adam_eps=(0, 1),
    weight_decay=(0, 10), grad_clip=(0, 1e9), token_budget=(1, 10**9),
    eval_every=natural, eval_n=(1, 10**4), eval_problems=natural, eval_temperature=(0, 1e3),
    eval_top_p=(1e-6, 1), eval_max_new_tokens=natural, eval_rows=(1, 10**5),
    eval_show=(0, 1000),
    save_every=positive, keep=(1, 10**6), log_every=positive,
    toy_ops=(1, 16), toy_layers=(1, 64), toy_width=(8, 4096), toy_heads=(1, 64), toy_batch=(1, 10**5),
    toy_teacher_layers=(0, 64), toy_teacher_width=(0, 4096), toy_teacher_tokens=('same', 'merged'),
    toy_student_steps=(1, 10**6), toy_teacher_steps=(1, 10**6), toy_student_lr=(0, 1), toy_teacher_lr=(0, 1),
    toy_hints=share, toy_teacher_half=('both', 'sums', 'products'),
    toy_train=(1, 10**6), toy_eval=(1, 10**5),
)

# Keys that say where and how a run happens, not what it computes: a resumed run may differ in these.
free = ('out_dir', 'device', 'dry_run', 'report', 'profile', 'ranks', 'shard_ranks', 'teacher_shard',
        'timeout', 'token_budget', 'head_rows', 'checkpointing', 'compile', 'toy_dir', 'regrade')

# Keys with which a run may go on differently; its log says from which step.
later = ('steps', 'lr', 'keep')
later += tuple(key for key in config if key.startswith(('eval_', 'diagnose_', 'save_', 'log_')))

# The keys that each script reads. Another key on its command line would change nothing, so it is an error; in
# a config file it is fine, because scripts share those. distill.py reads all but those of a fit: a new key is
# its own until it is named for other scripts. tests/test_configs.py compares these lists with the code.
fit = ('bridge_prompts', 'bridge_held_out', 'bridge_fit', 'bridge_ridge', 'bridge_bias', 'bridge_lr')
toy = tuple(key for key in config if key.startswith('toy_'))
common = ('seed', 'device', 'dtype', 'dry_run', 'student', 'teacher', *toy)
reads = {
    'distill.py': tuple(key for key in config if key not in (*fit, 'regrade')),
    'bridge.py': (
        *common, *fit, 'timeout', 'ranks', 'data', 'max_prompt_tokens', 'enable_thinking', 'date',
        'max_new_tokens', 'temperature', 'top_k', 'top_p',
        'layers', 'positions', 'last_k', 'first_k', 'last_frac', 'first_frac',
        'bridge', 'layer_map', 'bridge_rank', 'pair', 'teacher_ids', 'token_budget', 'eval_rows'),
    'eval_math.py': (
        *common, 'timeout', 'eval_data', 'enable_thinking', 'date', 'eval_n', 'eval_problems', 'eval_suffix',
        'eval_temperature', 'eval_top_p', 'eval_max_new_tokens', 'regrade', 'eval_rows'),
    'minimal.py': (
        *toy, 'seed', 'student', 'teacher', 'teacher_sees', 'teacher_every', 'data', 'prompts_per_step', 'n',
        'max_new_tokens', 'oprd_weight', 'opd_weight', 'rep_loss', 'layers', 'positions', 'steps', 'lr',
        'schedule', 'warmup', 'min_lr', 'beta1', 'beta2', 'adam_eps', 'weight_decay', 'grad_clip'),
    'studies/toy.py': (*common, 'data', 'eval_data'),
}
