"""
Self-distillation: the teacher is the initial student, whose prompt also shows the worked answer. The
student has seen such prompts in its supervised training, so it can read them.

    python distill.py configs/toy_self.py
"""
from configs.toy import config

config = config | dict(
    out_dir='out/toy_self', toy_hints=0.75, toy_student_steps=650, toy_teacher_steps=1,
    teacher='self', teacher_sees='solution', solution_text='{solution}{question}',
    oprd_weight=0.0, opd_weight=1.0, opd='full', lr=5e-4,
)
