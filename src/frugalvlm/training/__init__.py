"""One way to train, for all methods that learn something.

A method that learns is a `methods.trained.TrainedMethod`: `build(sizes)` makes its modules by the
sizes of a model, its rule reads them as `self.own`, and `load(SOURCE)` fills them. What it *is*
lies in methods/KEY.py; how it is *trained* in training/KEY.py, which holds

    LESSON = Lesson(objective=MyObjective, recipes={"pocket-llava-base": (Recipe(...), ...)})

- `Recipe`: one stage. Steps, batch, learning rate, and `trains`: which parameters, by how their
  names begin. Those of the method's modules begin with "own.", those of the model itself with
  "tuned." (`tuned.model.multi_modal_projector`); everything else is frozen. Several recipes are
  stages one after the other (FlashSloth has two); what any of them tunes is stored.
- `Objective`: made once with the method (whose `learnt` is what is being trained) and the model.
  `objective(batch, dice)` returns the paper's loss and figures for the log. `batch` is a whole
  prompt with its answer (`data.Batch`; right-padded), `dice` a NumPy generator that follows from
  seed and step alone: draw from it, from nothing else, and a training that was killed goes on to
  the same weights. What the paper does to the model in training (soft masks, a doubled batch, a
  teacher) is the objective's own business: hooks inside its call, `method.on(model)`, anything.
  Tuned parameters are the model's own tensors, so a plain forward pass trains them; `learn` gives
  the model back as it was.

`run.learn(method, model, processor, name, recipes, folder)` runs the stages with Transformers'
Trainer (optimiser, schedule, bfloat16, clipping, accumulation, checkpoints, bar) and returns the
method with what it learnt. Ours is only what Trainer does not do: checkpoints without the frozen
model, data by number (`data.Examples`), whole checkpoints after a kill, and the energy meter.
`invoke train --method KEY` scores and installs the outcome (`probes.methods`).

Adapters of PEFT are modules of the model: put them in before `learn` and name them in `trains`.
"""

from frugalvlm.training.lesson import Lesson, Log, Objective, Recipe, TrainingError, lesson_of

__all__ = ["Lesson", "Log", "Objective", "Recipe", "TrainingError", "lesson_of"]
