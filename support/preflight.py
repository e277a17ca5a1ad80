"""
Before the first step: what would go wrong without a message elsewhere is a line or an error here.

Do the two models fit? Do the objective's keys make sense together? Do the longest texts fit into the
models, and does the run fit into memory? `--dry-run` shows all of it, with disk and time, and stops.

Simpler than usual: only config.json and the tokenizers are read, so it takes seconds for any model. What it
does not do: run any part of a step; memory and time are counted (support/memory.py, support/plan.py).

    python distill.py configs/toy.py --dry-run                    the same line on 1 GPU, and under torchrun
    python distill.py configs/r1_1p5b.py --dry-run ranks=8        for eight GPUs, asked from any machine
"""
from formats.huggingface import read_config
from formats.problems import folded
from formats.tokenizer import check_ids, disagreement, same_vocabulary, shared_size, stop_set
from losses import DISTANCES, layer_pairs, layer_set
from support.memory import GiB, Plan, bridge_phases, longest_prompt, peak, phases, work_of
from support.optimizer import ever_positive, weight_at
from support.plan import (
    check_folder,
    disk_lines,
    host_lines,
    memory_lines,
    memory_notes,
    mesh_lines,
    of_free,
    planned,
    time_lines,
)
from support.runtime import UserError, print0


def preflight(cfg, pairs, env, tok_s, toks_t, train, held_out):
    """Check the pairs, the objective, the lengths and the memory: one printed line each, or a UserError.

    pairs: the config of each teacher (extensions.several_teachers.configs). toks_t: their tokenizers.
    -> ([{student layer: teacher layer} of each teacher], stop ids, length of the longest sequence).
    """
    student = read_config(cfg['student'])
    teachers = [read_config(pair['teacher']) for pair in pairs]
    env = planned(cfg, env)
    lines = []
    layer_maps = []
    longest = 0
    for number, (pair, teacher, tok_t) in enumerate(zip(pairs, teachers, toks_t, strict=True)):
        own = [problem for problem in train if problem.teacher == number]
        if len(pairs) > 1:
            lines.append(f"teacher {number + 1}: {pair['teacher']}, {len(own)} training problems")
        if not own:
            raise UserError(f"teacher {number + 1} ({pair['teacher']}) has no training problem; see "
                            'teacher_share=')
        layer_map, said = check_teacher(pair, student, teacher, tok_s, tok_t, own, held_out)
        lines += [line for line in said if line not in lines]
        layer_maps.append(layer_map)
        longest = max(longest, check_lengths(cfg, student, teacher, own, held_out))

    # One layer of the student has one line in the log. Where a pair has no states to compare, none are.
    if not all(layer_maps):
        layer_maps = [{} for _ in layer_maps]
    if cfg['warmup'] and not round(cfg['warmup'] * cfg['steps']):
        lines.append(f"note: warmup={cfg['warmup']} of {cfg['steps']} steps rounds to 0: the first step has "
                     'the full learning rate')
    answers = cfg['prompts_per_step'] * cfg['n']
    if answers < env.world:
        raise UserError(f"prompts_per_step={cfg['prompts_per_step']} with n={cfg['n']} gives {answers} "
                        f'answers, fewer than the {env.world} ranks; raise one of them')
    unknown = sum(problem.answer is None for problem in train)
    if ever_positive(cfg['reward_weight']) and unknown:
        raise UserError(f"reward_weight: {unknown} of {len(train)} problems of data= have no known answer to "
                        'grade by; delete them, or set reward_weight=0')
    lines += problem_lines(cfg, train, held_out)

    # Memory: all teachers lie there, and the largest one works.
    by_size = sorted(range(len(pairs)), key=lambda number: -teachers[number].count())
    largest, *others = by_size
    vocab = min(shared_size(tok_s, tok_t) for tok_t in toks_t)
    work = work_of(cfg, env.world, train, held_out, vocab)
    lines += cost_lines(Plan(pairs[largest], student, teachers[largest], layer_maps[largest], work, env,
                             tuple(teachers[number] for number in others)))
    if cfg['dry_run']:
        layer_map = layer_maps[0]
        layers = list(layer_map) if all(l == t for l, t in layer_map.items()) else layer_map
        lines.append(f"plan: {cfg['steps']} steps of {cfg['prompts_per_step']} prompts x {cfg['n']} answers "
                     f'over {env.world} rank(s); {len(train)} training problems; layers {layers}')
    print0('\n'.join(f'  {line}' for line in lines))
    stops = [stop_set(tok_s, tok_t) for tok_t in toks_t]
    return layer_maps, sorted({number for stop in stops for number in stop}), longest


def check_teacher(cfg, student, teacher, tok_s, tok_t, train, held_out):
    """Do a student and one of its teachers (ModelConfigs) fit together, and the objective with them?
    -> ({student layer: teacher layer}, lines), or a UserError. train: the problems of this teacher."""
    hidden = ever_positive(cfg['oprd_weight'])
    same = same_vocabulary(tok_s, tok_t)

    # The pair. Through a bridge, or by bytes alone, any two models fit.
    any_pair = bool(cfg['bridge']) or (cfg['opd'] == 'byte' and not hidden)
    lines = check_pair(student, teacher, tok_s, tok_t, train[0].question, hidden, any_pair)
    if same:
        lines += check_prompts([*train, *held_out], teacher, tok_s, tok_t)
    elif cfg['teacher_ids'] == 'student':
        check_ids('teacher', teacher.V, tok_s)           # it is fed the student's ids as they are

    # The layers that are compared, or that are only looked at from time to time.
    layer_map = {}
    if cfg['bridge'] or (same and student.d == teacher.d):
        layer_map = match_layers(cfg, student, teacher)
    if hidden and not layer_map:
        raise UserError(f"layers={cfg['layers']!r}: a model of {student.L} layers has none; choose others")
    if layer_map and not cfg['bridge']:                  # a bridge has its own pairs, which distill.py prints
        lines += layer_lines(layer_map, student.L, teacher.L, cfg['layer_map'], student.hf.get('kept_layers'))
    if ever_positive(cfg['attention_weight']):
        check_attention(cfg, student, teacher, same)
    return layer_map, lines + check_objective(cfg, same)


# ---- layers -----------------------------------------------------------------------------------

def match_layers(cfg, student, teacher):
    """{student layer: teacher layer} of this config, for two ModelConfigs, or a UserError."""
    L_s = student.L
    L_t = teacher.L
    layers = cfg['layers']
    teacher_layers = cfg['layer_map']
    if isinstance(layers, list) and max(layers) > L_s:
        raise UserError(f'layers={layers}, but the student has {L_s}; choose from 1 to {L_s}')
    layers = layer_set(layers, L_s)

    if isinstance(teacher_layers, list):
        if len(teacher_layers) != len(layers) or max(teacher_layers) > L_t:
            raise UserError(f'layer_map={teacher_layers}: give a teacher layer, 1 to {L_t}, for each of '
                            f'layers {layers}')
    if teacher_layers == 'cka' and not cfg['bridge']:
        raise UserError("layer_map='cka' is found by bridge.py; make a bridge, or give a list")
    if teacher_layers == 'kept':
        teacher_layers = kept_by_student(layers, L_s, L_t, student.hf.get('kept_layers'))
    return layer_pairs(layers, L_s, L_t, teacher_layers)


def kept_by_student(layers, L_s, L_t, kept):
    """layer_map='kept': for each of `layers` the teacher layer that it was before the student was pruned ->
    list, or a UserError. kept: the list `kept_layers` of the student's config.json, if it has one."""
    if not kept:
        raise UserError("layer_map='kept', but config.json of the student has no kept_layers; give a list, "
                        'or prune with python -m studies.damage')
    if len(kept) != L_s:
        raise UserError(f"layer_map='kept', but kept_layers in config.json of the student names {len(kept)} "
                        f'layers and the student has {L_s}; give a list')
    if max(kept) > L_t:
        raise UserError(f"layer_map='kept': the student has kept layer {max(kept)}, but the teacher has "
                        f'{L_t}; choose the model that was pruned as the teacher, or give a list')

    # The last state of either model is the final-normed one, whichever block comes before the norm.
    return [L_t if layer == L_s else kept[layer - 1] for layer in layers]


def layer_lines(layer_map, L_s, L_t, how, kept=None):
    """{student layer: teacher layer} -> the lines that show it. how: the key layer_map. kept: as in
    `kept_by_student`."""
    pairs = [f'{l} -> {t}' for l, t in layer_map.items()]
    same_numbers = all(l == t for l, t in layer_map.items())
    lines = [f'layers, student -> teacher: {", ".join(pairs)}']
    if same_numbers:
        lines = [f'layers {as_ranges(layer_map)}, each with the teacher layer of the same number']

    # A pruned student's layer 3 may have been the teacher's layer 9. Some students say so themselves.
    if how == 'depth' and kept and kept != list(range(1, L_s + 1)):
        lines.append(f'note: config.json of the student says that it was pruned and has kept layers '
                     f"{as_ranges(kept)}; layer_map=kept pairs it with those")
    elif how == 'depth' and L_s < L_t and not same_numbers:
        first = next(pair for pair, (l, t) in zip(pairs, layer_map.items(), strict=True) if l != t)
        lines.append(f'note: {L_s} student layers are paired with {L_t} teacher layers by depth '
                     f'({first}, ...); a pruned student may want layer_map=')
    return lines


def as_ranges(numbers):
    """Ascending numbers -> text: [1, 2, 3, 7] -> '1-3, 7'."""
    ranges = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)


# ---- the objective, lengths, memory -----------------------------------------------------------

def check_objective(cfg, same=True):
    """Do the keys of the objective make sense together? -> notes, or a UserError. same: do both models have
    the same vocabulary?"""
    opd = cfg['opd']
    if not same and opd != 'byte' and ever_positive(cfg['opd_weight']):
        raise UserError(f"opd={opd!r} compares token by token, but the tokenizers differ; use opd='byte'")
    if not same and opd == 'byte' and cfg['teacher_ids'] == 'student':
        raise UserError("opd='byte' needs a teacher that reads the text; set teacher_ids=text")

    # A step without any loss would be a rollout for nothing. For constant weights one look is enough.
    # Between two neighbouring knots of the two schedules, and before the first and after the last one, both
    # weights are straight lines, and no weight is negative. A straight line that is 0 inside an interval and
    # negative nowhere in it is 0 in all of it. So if any step inside an interval has no loss, the first one
    # in it has none: it is enough to look at the first step, and at the steps at and next to each knot. A
    # knot at share x lies near step x * steps + 1, and rounding moves it by less than a step.
    keys = ('oprd_weight', 'opd_weight', 'reward_weight', 'attention_weight')
    schedules = [cfg[key] for key in keys if isinstance(cfg[key], list)]
    looked = {1}
    for share in {share for knots in schedules for share, _ in knots}:
        near = int(share * cfg['steps']) + 1
        looked |= {near - 1, near, near + 1}
    for step in sorted(step for step in looked if 1 <= step <= cfg['steps']):
        weights = [weight_at(step, cfg['steps'], cfg[key]) for key in keys]
        if not any(weights):
            raise UserError(f'step {step}: {", ".join(keys)} are all 0 there; raise one')
    rewarded = ever_positive(cfg['reward_weight'])
    if rewarded and cfg['n'] == 1:
        raise UserError('reward_weight: with n=1 an answer is compared with no other; raise n=')
    if rewarded and (cfg['answers_by'] != 'student' or cfg['temperature'] == 0):
        raise UserError('reward_weight: rewards compare answers that the student has drawn, but '
                        f"answers_by={cfg['answers_by']!r} and temperature={cfg['temperature']:g}; set "
                        'answers_by=student and temperature=1')
    if cfg['rep_loss'] not in DISTANCES:
        raise UserError(f"rep_loss={cfg['rep_loss']!r}: no such distance in losses.py; "
                        f"choose one of {', '.join(DISTANCES)}")
    if cfg['position_offset'] and (cfg['bridge'] or not same or cfg['positions'] == 'drift'):
        raise UserError('position_offset=1 belongs to Eq. (6) of two models with one vocabulary, without '
                        'drift weights; set it to 0')
    if cfg['answers_by'] == 'teacher' and not same:
        raise UserError("answers_by='teacher': the student cannot read its tokens, the tokenizers differ; "
                        'set answers_by=student')
    for key in ('opd_future', 'opd_baseline'):
        if cfg[key] and opd != 'sampled':
            raise UserError(f"{key}=True belongs to opd='sampled', but opd={opd!r}; drop one of them")
    if cfg['bridge'] and cfg['positions'] == 'drift':
        raise UserError("positions='drift' weighs Eq. (6), not a bridge; set positions=all")
    if ever_positive(cfg['opd_weight']):
        check_output_space(cfg)

    # Both are estimates with samples of p.
    sampled = opd == 'sampled' and ever_positive(cfg['opd_weight'])
    drawn_from = (cfg['temperature'], cfg['top_k'], cfg['top_p'])
    from_p = cfg['answers_by'] == 'student' and drawn_from == (cfg['student_temperature'], 0, 1.0)
    if from_p or not (sampled or rewarded):
        return []
    biased = 'Eq. (3) is biased' if sampled else 'the gradient of the rewards is biased'
    return [f'note: answers are not drawn from p itself (temperature, top_k, top_p, answers_by), so {biased}']


def check_attention(cfg, student, teacher, same):
    """Can the attention of these two models (ModelConfigs) be compared, as the config says? Else a
    UserError. same: as in `check_objective`."""
    layers = cfg['attention_layers']
    heads = cfg['attention_heads']
    if not same or cfg['teacher_sees'] == 'solution':
        raise UserError('attention_weight: the teacher reads other tokens than the student, so its attention '
                        'is over other keys; set attention_weight=0')
    if cfg['compile']:
        raise UserError('attention_weight: the attention of compiled blocks cannot be watched; set '
                        'compile=False')
    if isinstance(layers, list) and max(layers) > student.L or not layer_set(layers, student.L):
        raise UserError(f'attention_layers={layers!r}, but the student has {student.L}; choose from 1 to '
                        f'{student.L}')
    if heads == 'all' and student.H != teacher.H:
        raise UserError(f'attention_heads=all: the student has {student.H} heads, the teacher {teacher.H}; '
                        'give a list of heads that shall be alike')
    common = min(student.H, teacher.H)
    if heads != 'all' and max(heads) > common:
        raise UserError(f'attention_heads={heads}: the student has {student.H} heads, the teacher '
                        f'{teacher.H}; choose from 1 to {common}')


def check_output_space(cfg):
    """Do the keys of the output-space term make sense together? Else a UserError."""
    opd = cfg['opd']
    if opd == 'supervised' and (cfg['answers_by'] == 'student' or cfg['kl_direction'] == 'forward'):
        raise UserError("opd='supervised' learns answers of others as they are; set "
                        'answers_by=teacher (or solution) and kl_direction=reverse')
    if opd == 'sampled' and cfg['kl_direction'] == 'forward':
        raise UserError("opd='sampled' with kl_direction='forward': the student's own tokens do not estimate "
                        "KL(q || p); use opd='full' or 'topk'")
    if opd == 'topk' and cfg['opd_tail'] == 'reward' and cfg['kl_direction'] == 'forward':
        raise UserError("opd_tail='reward' with kl_direction='forward': a reward is a reverse KL; use "
                        "opd_tail='renorm' or 'bucket'")
    one_token = opd == 'topk' and cfg['opd_k'] == 1 and cfg['opd_support'] != 'union'
    if one_token and cfg['opd_tail'] == 'renorm':
        raise UserError("opd='topk' with opd_k=1 and opd_tail='renorm' is 0 whatever the models say; "
                        "use opd='sampled' (the paper's top-1), opd_tail='bucket' or a larger opd_k")


def check_lengths(cfg, student, teacher, train, held_out):
    """Length of the longest sequence that may come, in tokens; a UserError if a model cannot read it."""
    longest = 0
    for key, problems in (('max_new_tokens', train), ('eval_max_new_tokens', held_out)):
        new = cfg[key] or cfg['max_new_tokens']
        for side, c in (('student', student), ('teacher', teacher)):
            prompt = longest_prompt(problems, side)
            longest = max(longest, prompt + new)
            if problems and prompt + new > c.context:
                raise UserError(f'{side}: reads {c.context} tokens, but the longest prompt has {prompt} and '
                                f'{key}={cfg[key]} allows {new} more; lower {key}')
    return longest


def problem_lines(cfg, train, held_out):
    """How often a run asks its problems, and how many of the held-out ones it trains on -> lines. train,
    held_out: problems."""
    prompts = cfg['steps'] * cfg['prompts_per_step']
    lines = []
    if prompts != len(train):
        line = (f"{cfg['steps']} steps x {cfg['prompts_per_step']} prompts: {prompts / len(train):.3g} "
                f'epochs of {len(train)} training problems')
        if prompts < len(train):
            line += f'; {len(train) - prompts} are never asked'
        lines.append(line)

    # A question stays the same with other capitals or spaces, and with an instruction behind it.
    suffix = cfg['eval_suffix']
    known = {folded(problem.question, suffix) for problem in train}
    common = sum(folded(problem.question, suffix) in known for problem in held_out)
    if common == len(held_out) > 0:
        same = 'data and eval_data are the same: ' if cfg['data'] == cfg['eval_data'] else ''
        lines.append(f'note: {same}all {common} held-out questions are training questions too, so scores do '
                     'not show what is learnt beyond them')
    elif common:
        lines.append(f'note: {common} of {len(held_out)} held-out questions are training questions too')
    return lines


def cost_lines(plan):
    """Memory in one line, and who shares weights; in a dry run memory by phase, disk and time as well."""
    estimate = phases(plan)
    is_here = not plan.cfg['ranks']
    lines = summary_lines(plan, estimate, is_here) + mesh_lines(plan)
    if plan.cfg['dry_run']:
        lines += memory_lines(estimate)
        lines += host_lines(plan)
        lines += disk_lines(plan, is_here)
        lines += time_lines(plan, is_here)
    return lines


def summary_lines(plan, estimate, is_here):
    """Sizes and the largest phase in one line, and a note where it does not fit."""
    largest = peak(estimate)
    need = sum(estimate[largest].values()) / GiB
    return [f'student {plan.student.count() / 1e6:.2f}M weights, teacher {plan.teacher.count() / 1e6:.2f}M; '
            f'memory per rank, estimated: {need:.2f} GiB ({largest}){of_free(plan.env, is_here)}',
            *memory_notes(estimate, plan.env, is_here)]


def preflight_bridge(cfg, env, shapes, layer_map, problems, vocab):
    """bridge.py's memory, by phase in a dry run, and whether its folder can be made. shapes: both
    ModelConfig."""
    # The student answers one problem per slot.
    env = planned(cfg, env)
    slots = min(cfg['bridge_prompts'], cfg['eval_rows'] * env.world)
    work = work_of(cfg | {'prompts_per_step': slots, 'n': 1}, env.world, problems, [], vocab)
    plan = Plan(cfg, *shapes, layer_map, work, env)
    estimate = bridge_phases(plan)
    lines = summary_lines(plan, estimate, not cfg['ranks'])
    if cfg['dry_run']:
        check_folder(cfg['bridge'])
        lines += memory_lines(estimate)
    print0('\n'.join(f'  {line}' for line in lines))


# ---- the pair ---------------------------------------------------------------------------------

def check_pair(student, teacher, tok_s, tok_t, question, hidden=True, bridge=False):
    """Everything about a pair of models that could be wrong without a message -> list of one-line findings.

    student, teacher: ModelConfig. tok_s, tok_t: Tokenizer. question: a training question, to compare both
    chat templates. hidden: are hidden states compared, or output distributions alone (then any widths)?
    bridge: any widths and any tokenizers fit. Raises UserError.
    """
    if student.d != teacher.d and hidden and not bridge:
        raise UserError(f'student width {student.d}, teacher width {teacher.d}: Eq. (6) compares states '
                        'number by number; choose a teacher of the same width, make a bridge (bridge.py), or '
                        'set oprd_weight=0 opd_weight=1')

    # The vocabularies. Extra tokens on either side are fine, another meaning of an id is not.
    wrong = disagreement(tok_s, tok_t)
    if wrong is not None and not bridge:
        number = tok_t.words[wrong]
        meanings = {i: word for word, i in tok_s.words.items()}
        raise UserError(f'tokenizers differ: id {number} is {wrong!r} to the teacher and '
                        f'{meanings.get(number)!r} to the student, so the teacher would read gibberish; '
                        "choose a teacher with the student's vocabulary")
    check_ids('student', student.V, tok_s)
    check_ids('teacher', teacher.V, tok_t)
    shared = sum(tok_t.words.get(word) == number for word, number in tok_s.words.items())
    lines = [f'vocabulary: {shared} tokens have the same id on both sides; the student has '
             f'{len(tok_s.words) - shared} others, the teacher {len(tok_t.words) - shared}']
    if wrong is None and tok_s.size != tok_t.size:
        lines.append(f'note: only ids below {shared_size(tok_s, tok_t)} are written and compared, which both '
                     'vocabularies have')

    compared = 'hidden states are compared'
    if not hidden:
        compared = 'output distributions are compared, hidden states are not'
    elif bridge:
        compared = 'hidden states are compared through the bridge'
    lines.append(f'widths {student.d} and {teacher.d}, {student.L} student layers and {teacher.L} teacher '
                 f'layers: {compared}')
    stop = stop_set(tok_s, tok_t)
    lines.append(f'stop ids: student {tok_s.stop_ids}, teacher {tok_t.stop_ids}; answers end at any of '
                 f'{stop}')
    if wrong is None and not set(stop) & set(tok_t.stop_ids):
        lines.append(f'note: the teacher ends its answers with {tok_t.stop_ids}, which the student never '
                     'writes')

    # The prompts. With one vocabulary the teacher reads the student's.
    for side, tok in (('student', tok_s), ('teacher', tok_t)):
        if not tok.template:
            lines.append(f'note: the {side} has no chat template; its prompt is the question and a new line')
    prompt_s = tok_s.render(question)
    prompt_t = tok_t.render(question)
    if prompt_s == prompt_t:
        lines.append(f'prompt, the same for both: {prompt_s!r}')
        return lines
    lines.append(f"prompt, student's: {prompt_s!r}")
    lines.append(f"prompt, teacher's: {prompt_t!r}")
    lines.append("note: the templates differ; the teacher reads the student's" if wrong is None else
                 'note: the tokenizers differ; the teacher reads its own prompt and the text of the answers')
    return lines


def check_prompts(problems, teacher, tok_s, tok_t):
    """The teacher reads the student's prompts as ids: does it know them? -> notes, or a UserError."""
    ids = set()
    for problem in problems:
        ids.update(problem.ids)
    unknown = sorted(ids - set(tok_t.words.values()))
    if not unknown:
        return []
    meanings = {i: word for word, i in tok_s.words.items()}
    token = f'id {unknown[-1]}, {meanings.get(unknown[-1])!r}'
    if unknown[-1] >= teacher.V:
        raise UserError(f'the prompts hold {token}, but the embedding of the teacher has {teacher.V} rows; '
                        'choose a teacher whose vocabulary has it')
    return [f"note: the prompts hold {token}, which the teacher's tokenizer does not know"]
