"""
Before the first step: what goes wrong in silence elsewhere is a line or an error here.

Do the two models fit, do the objective's keys make sense together, do the longest texts fit into the
models and the run into memory? `--dry-run` shows all of it and stops. Nothing heavy is loaded.
"""
import torch

from formats.huggingface import read_config
from formats.tokenizer import check_ids
from losses import DISTANCES, layer_pairs, layer_set
from support.optimizer import ever_positive, weight_at
from support.runtime import UserError, print0

GiB = 2**30


def preflight(cfg, place, tok, tok_t, train, held_out):
    """Look before the leap: the pair, the lengths, the memory; a line each, or a UserError.
    -> (phi {student layer: teacher layer}, stop ids, longest sequence)."""
    student, teacher = read_config(cfg['student']), read_config(cfg['teacher'])
    hidden, bridge = ever_positive(cfg['oprd_weight']), bool(cfg['bridge'])
    byte = cfg['opd'] == 'byte' and not hidden
    lines = check_pair(student, teacher, tok, tok_t, train[0].question, hidden, bridge or byte)
    vanilla = student.d == teacher.d and tok.words == tok_t.words
    phi = match_layers(cfg, student.L, teacher.L) if bridge or vanilla else {}
    if tok.words != tok_t.words and ever_positive(cfg['opd_weight']) and cfg['opd'] != 'byte':
        raise UserError(f"opd={cfg['opd']!r} compares token by token, but the tokenizers differ; use "
                        "opd='byte'")
    if cfg['opd'] == 'byte' and cfg['teacher_ids'] == 'student' and tok.words != tok_t.words:
        raise UserError("opd='byte' needs a teacher that reads the text; set teacher_ids=text")
    if hidden and not phi:
        raise UserError(f"layers={cfg['layers']!r}: a model of {student.L} layers has none; choose others")
    lines += check_objective(cfg)
    if cfg['prompts_per_step'] < place.world:
        raise UserError(f"prompts_per_step={cfg['prompts_per_step']} is fewer than the {place.world} ranks; "
                        'raise it')
    longest = 0
    for key, problems in (('max_new_tokens', train), ('eval_max_new_tokens', held_out)):
        new, prompt = cfg[key] or cfg['max_new_tokens'], max((len(p.ids) for p in problems), default=0)
        longest = max(longest, prompt + new)
        for side, c in (('student', student), ('teacher', teacher)):
            if problems and prompt + new > c.context:
                raise UserError(f'{side}: reads {c.context} tokens, but the longest prompt has {prompt} and '
                                f'{key}={cfg[key]} allows {new} more; lower {key}')
    need = memory_estimate(cfg, student, teacher, phi, longest, place)
    free = f' of {torch.cuda.mem_get_info()[0] / GiB:.1f} free' if place.device.type == 'cuda' else ''
    print0('\n'.join(f'  {line}' for line in lines))
    print0(f'  student {student.count() / 1e6:.2f}M weights, teacher {teacher.count() / 1e6:.2f}M; '
           f'memory per rank, estimated: {sum(need.values()) / GiB:.2f} GiB{free}')
    if cfg['dry_run']:
        print0('\n'.join(f'    {n / GiB:8.2f} GiB  {name}' for name, n in need.items()))
        pairs = list(phi) if all(l == t for l, t in phi.items()) else phi
        print0(f"  plan: {cfg['steps']} steps of {cfg['prompts_per_step']} prompts x {cfg['n']} answers over "
               f'{place.world} rank(s); {len(train)} training problems; layers '
               f'{pairs}')
    theirs = tok_t.stop_ids if tok.words == tok_t.words else []              # ids of another mean others
    return phi, sorted({*tok.stop_ids, *theirs}), longest


def match_layers(cfg, L_s, L_t):
    """phi {student layer: teacher layer} of this config, for models of depths L_s and L_t, or a UserError."""
    layers, teachers = cfg['layers'], cfg['layer_map']
    if isinstance(layers, list) and max(layers) > L_s:
        raise UserError(f'layers={layers}, but the student has {L_s}; choose from 1 to {L_s}')
    layers = layer_set(layers, L_s)
    if isinstance(teachers, list) and (len(teachers) != len(layers) or max(teachers) > L_t):
        raise UserError(f'layer_map={teachers}: give a teacher layer, 1 to {L_t}, for each of layers '
                        f'{layers}')
    if teachers == 'cka' and not cfg['bridge']:
        raise UserError("layer_map='cka' is found by bridge.py; make a bridge, or give a list")
    return layer_pairs(layers, L_s, L_t, teachers)


def check_objective(cfg):
    """Do the keys of the objective make one together? -> notes, or a UserError."""
    for step in range(1, cfg['steps'] + 1):
        if not any(weight_at(step, cfg['steps'], cfg[k]) for k in ('oprd_weight', 'opd_weight')):
            raise UserError(f'step {step}: oprd_weight and opd_weight are both 0 there; raise one')
    if cfg['rep_loss'] not in DISTANCES:
        raise UserError(f"rep_loss={cfg['rep_loss']!r}: no such distance in losses.py; "
                        f"choose one of {', '.join(DISTANCES)}")
    if cfg['position_offset'] and (cfg['bridge'] or cfg['positions'] == 'drift'):
        raise UserError("position_offset=1 belongs to Eq. (6) without a bridge and without drift weights; "
                        'set it to 0')
    for key in ('opd_future', 'opd_baseline'):
        if cfg[key] and cfg['opd'] != 'sampled':
            raise UserError(f"{key}=True belongs to opd='sampled', but opd={cfg['opd']!r}; drop one of them")
    if cfg['bridge'] and cfg['positions'] == 'drift':
        raise UserError("positions='drift' weighs Eq. (6), not a bridge; set positions=all")
    if not ever_positive(cfg['opd_weight']):
        return []
    if cfg['opd'] == 'sampled' and cfg['kl_direction'] == 'forward':
        raise UserError("opd='sampled' with kl_direction='forward': the student's own tokens do not estimate "
                        "KL(q || p); use opd='full' or 'topk'")
    if cfg['opd'] == 'topk' and cfg['opd_tail'] == 'reward' and cfg['kl_direction'] == 'forward':
        raise UserError("opd_tail='reward' with kl_direction='forward': a reward is a reverse KL; use "
                        "opd_tail='renorm' or 'bucket'")
    one = cfg['opd'] == 'topk' and cfg['opd_k'] == 1 and cfg['opd_support'] != 'union'
    if one and cfg['opd_tail'] == 'renorm':
        raise UserError("opd='topk' with opd_k=1 and opd_tail='renorm' is 0 whatever the models say; "
                        "use opd='sampled' (the paper's top-1), opd_tail='bucket' or a larger opd_k")
    drawn = (cfg['temperature'], cfg['top_k'], cfg['top_p'])
    if cfg['opd'] == 'sampled' and drawn != (cfg['student_temperature'], 0, 1.0):
        return ['note: answers are not drawn from p itself (temperature, top_k, top_p), so Eq. (3) is biased']
    return []


def memory_estimate(cfg, student, teacher, phi, longest, place):
    """Bytes per rank, by what they are for. Activations are a rough count: per token and block, what
    a gated MLP and attention keep for their backward, or one state where blocks are recomputed."""
    size = 2 if place.dtype == torch.bfloat16 else 4
    rows = -(-cfg['prompts_per_step'] // place.world) * cfg['n']
    tokens = min(max(cfg['token_budget'], longest), rows * longest)
    kept = student.d if cfg['checkpointing'] else 14 * student.d + 5 * student.ff
    kv = 2 * student.L * student.G * student.e * size                        # bytes of a token
    weights = student.count()
    row = 4 * cfg['bridge_rank'] if cfg['bridge'] and cfg['bridge_rank'] else teacher.d * size
    # the head's gradient in float32, beside it its cast, the gathered head and what is reduced over ranks
    each = 4 if size == 4 and place.world == 1 else 4 + 2 * size + 4
    head = each * student.V * student.d + 16 * student.V * (cfg['head_rows'] or 64)
    return {
        'student weights, gradient and AdamW, float32': 16 * weights / place.world,
        'student weights gathered for sampling': weights * size * (place.world > 1 or size == 2),
        'teacher weights': teacher.count() * size,
        'KV cache while sampling': max(rows, cfg['eval_rows'] if cfg['eval_data'] else 0) * longest * kv,
        'teacher rows of a micro-batch': len(phi) * tokens * row,
        'activations of a micro-batch': tokens * kept * student.L * size,
        "the LM head's gradient and a chunk of logits": head * ever_positive(cfg['opd_weight']),
    }


def check_pair(student, teacher, tok_s, tok_t, question, hidden=True, bridge=False):
    """Everything about a pair that can be wrong in silence -> list of one-line findings.

    student, teacher: ModelConfig. tok_s, tok_t: Tokenizer. question: a training question, to compare
    both chat templates. hidden: are hidden states compared, or output distributions alone (any widths)?
    bridge: through one, so any widths and any tokenizers. Raises UserError.
    """
    if student.d != teacher.d and hidden and not bridge:
        raise UserError(f'student width {student.d}, teacher width {teacher.d}: Eq. (6) compares states '
                        'number by number; choose a teacher of the same width, make a bridge (bridge.py), or '
                        'set oprd_weight=0 opd_weight=1')
    vocab_s, vocab_t = tok_s.words, tok_t.words
    shared = vocab_s.keys() & vocab_t.keys()
    wrong = next((w for w in shared if vocab_s[w] != vocab_t[w]), None)
    ids_s = {i: w for w, i in vocab_s.items()}
    wrong = wrong or next((w for w, i in vocab_t.items() if w not in vocab_s and i in ids_s), None)
    if wrong is not None and not bridge:
        raise UserError(f"tokenizers differ: id {vocab_t[wrong]} is {wrong!r} to the teacher and "
                        f'{ids_s.get(vocab_t[wrong])!r} to the student, so the teacher would read gibberish; '
                        "choose a teacher with the student's vocabulary")
    check_ids('student', student.V, tok_s)
    check_ids('teacher', teacher.V, tok_t)
    if wrong is None:
        check_ids('teacher', teacher.V, tok_s)       # it reads what the student writes
    prompt_s, prompt_t = tok_s.render(question), tok_t.render(question)
    lines = [f'vocabulary: {len(shared)} tokens with the same id on both sides; only the student has '
             f'{len(vocab_s) - len(shared)} more, only the teacher {len(vocab_t) - len(shared)}',
             f'widths {student.d} and {teacher.d}, {student.L} student layers onto {teacher.L}: '
             + ('output distributions are compared, hidden states are not' if not hidden else
                'hidden states are compared' + ' through the bridge' * bridge),
             f'stop ids: student {tok_s.stop_ids}, teacher {tok_t.stop_ids}; answers end at any of them']
    lines += [f'note: the {side} has no chat template; its prompt is the question and a new line'
              for side, tok in (('student', tok_s), ('teacher', tok_t)) if not tok.template]
    if prompt_s == prompt_t:
        lines.append(f'prompt, the same for both: {prompt_s!r}')
    else:
        lines += [f"prompt, student's: {prompt_s!r}", f"prompt, teacher's: {prompt_t!r}",
                  "note: the templates differ; the teacher reads the student's" if wrong is None else
                  'note: the tokenizers differ; the teacher reads its own prompt and the text of the answers']
    return lines
