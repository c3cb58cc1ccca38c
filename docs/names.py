"""What has which name elsewhere, and what it is called here: the tables of "coming from".

Every row is a name of theirs, or several, and the ways to write it here, the best first. The table
shows the first whose names all exist, and says "none" where there is none. So a row may name what
is still to come.
"""

import ast
import importlib
import re
from types import ModuleType

import torch

import functional_sgd
import loop
import loop.losses
import loop.metrics
from functional_sgd import schedules

OURS: tuple[ModuleType, ...] = (functional_sgd, loop, schedules, loop.metrics, loop.losses)
GIVEN = {"torch", "opt", "state", "lr", "functional_sgd", "loop", "schedules", "learner", "model"}
"""Names in the examples that are not the library's: what the reader has."""

Rows = dict[str, str | tuple[str, ...]]

TORCH: Rows = {
    "SGD": "sgd(lr, mom, nesterov, dampening, wd)",
    "Adam": "adam(wd=...)  # wd is L2 there and here",
    "AdamW": "adamw(wd=...)",
    "RMSprop": "rmsprop()",
    "RAdam": "radam()",
    "NAdam": ("nadam()", "torch_optimizer(torch.optim.NAdam)"),
    "Adagrad": ("adagrad()", "torch_optimizer(torch.optim.Adagrad)"),
    "Adadelta": ("adadelta()", "torch_optimizer(torch.optim.Adadelta)"),
    "Adamax": ("adamax()", "torch_optimizer(torch.optim.Adamax)"),
    "Adafactor": ("adafactor()", "torch_optimizer(torch.optim.Adafactor)"),
    "ASGD": ("asgd()", "torch_optimizer(torch.optim.ASGD)"),
    "Rprop": ("rprop()", "torch_optimizer(torch.optim.Rprop)"),
    "Muon": ("muon()", "torch_optimizer(torch.optim.Muon)"),
    "SparseAdam": ("sparse_adam()", "lazy_rows(adam())"),
    "LBFGS": "lbfgs()",
    "Optimizer": "chain(...)  # a function; to_torch makes a torch.optim.Optimizer of it",
    "foreach=True, fused=True": "fuse(opt)",
    "capturable=True": "fuse(opt)  # lr and steps are tensors if you pass tensors",
    "differentiable=True": "opt(params, grads, state)  # always differentiable",
    "maximize=True": ("ascend", "negate the loss"),
    "amsgrad=True": ("amsgrad", "torch_optimizer(torch.optim.Adam, amsgrad=True)"),
    "weight_decay": "l2_reg, weight_decay  # L2, and decoupled",
    "param_groups": "by_path(params, {...}), partition({...}, labels)",
    "state_dict, load_state_dict": "save(state, path), load(path)  # a state is tensors",
    "Tensor.register_post_accumulate_grad_hook": "step_in_backward(opt, params)",
    "zero_grad": "value_and_grad(...)  # gradients are an argument: nothing to zero",
    "nn.utils.clip_grad_norm_": "clip_norm",
    "nn.utils.clip_grad_value_": "clip_value",
    "swa_utils.AveragedModel": "average_params(opt), AverageParams()",
    "swa_utils.update_bn": "refresh_buffers(learner, state)",
    "swa_utils.SWALR": "TorchScheduler(...)  # or any schedule",
    "amp.GradScaler, autocast": "MixedPrecision()",
    "lr_scheduler.*": "TorchScheduler(...)  # any of them; the rows below are pure functions",
    "ConstantLR": "Constant(...)",
    "LinearLR": "Linear(...)",
    "CosineAnnealingLR": "Cosine(...)  # by batches; TorchScheduler(..., every='epoch')",
    "ExponentialLR": "Exponential(...)",
    "PolynomialLR": "Polynomial(...)",
    "OneCycleLR": "TorchScheduler(...), one_cycle(...)  # its numbers; fastai's",
    "CosineAnnealingWarmRestarts": ("Restarts(...)", "warm_restarts(...)"),
    "SequentialLR": "Join(...)",
    "StepLR": ("step_decay(...)", "TorchScheduler(...)"),
    "MultiStepLR": ("multi_step(...)", "TorchScheduler(...)"),
    "CyclicLR": ("cyclic(...)", "TorchScheduler(...)"),
    "LambdaLR, MultiplicativeLR, ChainedScheduler": "ParamScheduler({...})  # any function",
    "ReduceLROnPlateau": "ReduceLROnPlateau()",
}

OPTAX: Rows = {
    # Optimizers.
    "adabelief": "adabelief()",
    "adadelta": ("adadelta()", "torch_optimizer(torch.optim.Adadelta)"),
    "adafactor": ("adafactor()", "torch_optimizer(torch.optim.Adafactor)"),
    "adagrad": ("adagrad()", "torch_optimizer(torch.optim.Adagrad)"),
    "adam": "adam()",
    "adamax, adamaxw": ("adamax(), adamaxw()", "torch_optimizer(torch.optim.Adamax)"),
    "adamw": "adamw(wd=1e-4)  # the default here is 0.01, as in torch",
    "adan": "adan()",
    "amsgrad": ("amsgrad", "torch_optimizer(torch.optim.Adam, amsgrad=True)"),
    "fromage": "fromage()",
    "lamb": "lamb()",
    "lars": ("lars()", "lars_ratio"),
    "lbfgs": "lbfgs()",
    "lion": "lion()",
    "nadam, nadamw": ("nadam(), nadamw()", "torch_optimizer(torch.optim.NAdam)"),
    "noisy_sgd": "noisy_sgd()",
    "novograd": "novograd()",
    "optimistic_gradient_descent": "optimistic_sgd()",
    "optimistic_adam, optimistic_adam_v2": "optimistic_adam()",
    "polyak_sgd": "polyak_sgd()",
    "radam": "radam()",
    "rmsprop": "rmsprop(), rmsprop_tf()  # with initial_scale=1, it is the second",
    "rprop": ("rprop()", "torch_optimizer(torch.optim.Rprop)"),
    "sgd": "sgd()",
    "sign_sgd": "sign_sgd()",
    "signum": "signum()",
    "sm3": "sm3()",
    "yogi": "yogi()",
    "nnls": (),
    "contrib.acprop": "acprop()",
    "contrib.ademamix": "ademamix()",
    "contrib.simplified_ademamix": "simplified_ademamix()",
    "contrib.adopt": "adopt()",
    "contrib.cocob": "cocob()",
    "contrib.dadapt_adamw": "d_adapt_adam()",
    "contrib.dog": "dog()",
    "contrib.dowg": "dowg()",
    "contrib.dpsgd, differentially_private_aggregate": "mean_of_clipped(...)",
    "contrib.galore": "galore()",
    "contrib.madgrad": "madgrad()",
    "contrib.mechanize": ("mechanize(opt)", "mechanic(opt)"),
    "contrib.momo": "momo()",
    "contrib.momo_adam": "momo_adam()",
    "contrib.muon": ("muon()", "torch_optimizer(torch.optim.Muon)"),
    "contrib.prodigy": "prodigy()",
    "contrib.sam, normalize": "sam(opt)",
    "contrib.schedule_free": "schedule_free(opt)",
    "contrib.schedule_free_adamw": "schedule_free_adamw()",
    "contrib.schedule_free_sgd": "schedule_free_sgd()",
    "contrib.schedule_free_eval_params": "opt.evaluated(...)  # the loop does it by itself",
    "contrib.sophia, hutchinson_estimator_diag_hessian": "sophia()",
    "contrib.split_real_and_imaginary": "chain(...)  # always so: complex leaves are pairs",
    "contrib.reduce_on_plateau": "ReduceLROnPlateau()",
    # Transformations: their parts of a chain, our rules.
    "trace": "heavy_ball",
    "ema": "average_grad, debias",
    "scale_by_adam": "average_grad, average_sqr_grad, debias, scale_by_rms",
    "scale_by_rms": "average_sqr_grad, scale_by_rms_eps_inside",
    "scale_by_stddev": "average_sqr_grad, center, scale_by_rms",
    "scale_by_learning_rate, scale": "sgd_step",
    "scale_by_schedule": "scheduled(opt, lr=...)",
    "scale_by_sign": "elementwise  # one line: dict(update=update.sign())",
    "scale_by_trust_ratio": "trust_ratio",
    "scale_by_radam": "rectify",
    "scale_by_lion": "sign_of_average",
    "scale_by_amsgrad": "keep_max_grad, scale_by_max",
    "scale_by_adadelta": "scale_by_past_updates",
    "scale_by_belief": "average_sqr_error, scale_by_rms",
    "scale_by_yogi": "average_sqr_grad_additive, scale_by_rms",
    "scale_by_adan": "average_difference, add_average_difference",
    "scale_by_adamax": "keep_max_grad",
    "scale_by_factored_rms": "scale_by_factored_rms",
    "scale_by_novograd": "novograd()",
    "scale_by_sm3": "scale_by_axes",
    "scale_by_rss": "sum_sqr_grad, scale_by_rms",
    "scale_by_rprop": "resilient_step",
    "scale_by_polyak": "polyak_ratio",
    "scale_by_optimistic_gradient": "optimistic",
    "scale_by_distance_over_gradients": "dog_ratio",
    "scale_by_param_block_norm, scale_by_param_block_rms": "scale_by_param_rms",
    "scale_by_lbfgs": "lbfgs()",
    "scale_by_backtracking_linesearch, scale_by_zoom_linesearch": (
        "lbfgs()  # has its own search; there is none for other optimizers",
    ),
    "contrib.scale_by_acprop, scale_by_ademamix, scale_by_adopt, scale_by_cocob, scale_by_galore, "
    "scale_by_madgrad, scale_by_muon, scale_by_simplified_ademamix": (
        "recipes()  # the rules of each recipe: opt.describe()",
    ),
    "add_decayed_weights": "weight_decay  # before the step; l2_reg adds to the gradient",
    "add_noise": "normal(key, like)  # in a rule of your own",
    "centralize": "centralize",
    "clip": "clip_value",
    "clip_by_global_norm": "clip_norm",
    "clip_by_block_rms": "clip_rms",
    "adaptive_grad_clip": "adaptive_clip",
    "per_example_global_norm_clip, per_example_layer_norm_clip": "mean_of_clipped(...)",
    "normalize_by_update_norm": "normalize",
    "bias_correction": "debias",
    "zero_nans": "elementwise  # one line: dict(grad=grad.nan_to_num(0.0))",
    "keep_params_nonnegative": "project_non_negative",
    "set_to_zero": "freeze(opt, pattern)",
    "identity": "identity()",
    "apply_every": "accumulate(opt, every)",
    "scale_gradient": "elementwise  # one line: dict(grad=factor * grad)",
    "flatten": "pack(params)",
    "stateless, stateless_with_tree_map": "elementwise, leafwise, treewise",
    "snapshot, monitor, measure_with_ema": (
        "snapshot_norm, snapshot_mean, snapshot_largest",
        "RecordValues(...)",
    ),
    # What takes an optimizer.
    "chain, named_chain": "chain(...)  # flat; every slot has a name",
    "apply_updates": "sgd_step  # the step is a rule; the optimizer returns params",
    "masked, selective_transform": "freeze(opt, pattern), by_path(params, {...})  # a wd of 0",
    "freeze": "freeze(opt, pattern)",
    "multi_transform, partition": "partition({...}, labels)",
    "MultiSteps": "accumulate(opt, every)",
    "ApplyEvery": "accumulate(opt, every)",
    "microbatch": "GradientAccumulation()",
    "apply_if_finite, skip_not_finite": "skip_nonfinite(opt)",
    "skip_large_updates, ShouldSkipUpdateFunction": ("skip_large(opt)",),
    "conditionally_mask, conditionally_transform": ("skip_nonfinite(opt)",),
    "lookahead, LookaheadParams": "lookahead(opt)",
    "inject_hyperparams, inject_stateful_hyperparams": (
        "opt(params, grads, state, dict(lr=0.1))  # every hyper is an argument of the step",
    ),
    "incremental_update, periodic_update": "average_params(opt), lookahead(opt)",
    "with_extra_args_support": "opt(..., hessian=tree)  # a column that no rule provides",
    "value_and_grad_from_state": "value_and_grad(...)",
    "tree_map_params": "optimizer state is a dict: slot -> tree like params",
    # Schedules.
    "constant_schedule": "Constant(...)",
    "cosine_decay_schedule": "Cosine(...)",
    "cosine_onecycle_schedule, linear_onecycle_schedule": "one_cycle(...)",
    "exponential_decay": "Exponential(...)",
    "join_schedules": "Join(...)",
    "linear_schedule": "Linear(...)",
    "polynomial_schedule": "Polynomial(...)",
    "piecewise_constant_schedule, piecewise_interpolate_schedule": (
        "Piecewise(...), interpolate(...)",
        "Join(...)",
    ),
    "sgdr_schedule": ("Restarts(...)", "warm_restarts(...)"),
    "warmup_cosine_decay_schedule": (
        "scheduled(opt, steps=n, lr=warmup_cosine(peak, warmup, start, end))  # a share of n",
    ),
    "warmup_constant_schedule, warmup_exponential_decay_schedule": (
        "Sequence(...)  # Stretch(Linear(...), n), then the other",
    ),
    # Numbers of trees.
    "global_norm": 'norm("grad", over="tree")  # as a default in a rule',
    "safe_norm, safe_root_mean_squares": 'norm("grad")  # its derivative is finite at 0',
    "update_moment, update_infinity_moment, update_moment_per_elem_norm": (
        "average_grad, average_sqr_grad",
    ),
    "projections.projection_box, projection_hypercube": "project_box",
    "projections.projection_non_negative": "project_non_negative",
    "projections.projection_simplex": "project_simplex",
    "projections.projection_l1_ball": "project_l1_ball",
    "projections.projection_l2_ball, projection_l2_sphere": "project_l2_ball, project_l2_sphere",
    "projections.projection_l1_sphere, projection_linf_ball, projection_halfspace, "
    "projection_hyperplane, projection_vector": (),
    "tree, tree_utils": "optree.tree_map  # of the package optree",
    "second_order, perturbations, assignment": (),
    "matrix_inverse_pth_root, power_iteration": "torch.linalg",
    "multi_normal": "torch.distributions",
    "safe_increment, safe_int32_increment, init_empty_state": "step  # counted by the library",
    "losses.*": "torch.nn.functional  # every loss of torch",
}

FASTAI: Rows = {
    "Learner(dls, model, ...)": "Learner(model, data, loss, opt, metrics, callbacks)",
    "learn.fit": "fit(learner, state, epochs)",
    "learn.fit_one_cycle": "fit_one_cycle(learner, state, epochs, lr)  # or steps=1000",
    "learn.fit_flat_cos": "fit_flat_cos(learner, state, epochs, lr)",
    "learn.fit_sgdr": "fit_sgdr(learner, state, cycles, cycle_length, lr)",
    "learn.fine_tune": "fine_tune(learner, state, epochs)",
    "learn.lr_find": "lr_find(learner, state)",
    "learn.distrib_ctx, to_distributed": "parallel(learner)",
    "learn.validate": "validate(learner, state)",
    "learn.get_preds, learn.predict": "predict(learner, state, data)",
    "learn.save, learn.load": "save(state, path), load(path)",
    "learn.export": "torch.save(learner.load(state).state_dict(), path)",
    "learn.freeze, freeze_to, unfreeze": "Freeze(patterns)",
    "learn.summary": "summary(learner, state)",
    "learn.one_batch": "one_batch(data)",
    "learn.show_batch, dls.show_batch": "plot_batch(learner, classes)  # images, or a table",
    "learn.recorder": "state.history",
    "learn.show_training_loop": "show_loop(learner)",
    "learn.to_fp16, to_bf16": "MixedPrecision()",
    "learn.no_bar, no_logging": "leave Progress() out of the callbacks",
    "learn.add_cb, remove_cb, added_cbs": "fit(learner, state, 1, [callback])",
    "learn.opt.set_hypers": "fit(learner, state, 1, lr=0.1)",
    "splitter, lr=slice(...)": "layer_groups(params), spread(params, low, high)",
    "DataLoaders, dls.c": "DataLoaders(train, valid), class_count(data)",
    "ClassificationInterpretation": "sample_losses(learner, state), plot_confusion_matrix(...)",
    "Optimizer(cbs=[...])": "chain(...)",
    "opt callback": "elementwise  # returns what changes, instead of changing it",
    "SGD": "sgd()",
    "RMSProp": "rmsprop()",
    "Adam": "adamw(sqr_mom=0.99, eps=1e-5)",
    "RAdam": "radam()",
    "QHAdam": "qhadam()",
    "Larc, Lamb": "larc(), lamb()",
    "Lookahead, ranger": "lookahead(opt), ranger()",
    "OptimWrapper": "torch_optimizer(torch.optim.AdamW)",
    "weight_decay, l2_reg": "weight_decay, l2_reg",
    "average_grad(dampening=True)": "average_grad",
    "average_grad(dampening=False)": "heavy_ball",
    "average_sqr_grad, momentum_step, rms_prop_step, adam_step": (
        "average_sqr_grad, sgd_step, scale_by_rms, debias",
    ),
    "sgd_step": "sgd_step",
    "SchedLin, SchedCos, SchedNo, SchedExp, SchedPoly": (
        "Linear(...), Cosine(...), Constant(...), Exponential(...), Polynomial(...)",
    ),
    "combine_scheds": "Join(...)",
    "combined_cos": "three_cosines(...)",
    "event": "events()",
    "CancelFitException, CancelEpochException, ...": "CancelFit, CancelEpoch, CancelBatch",
    "self.learn.loss = ...": "state.replace(loss=...)  # and return it",
}

LIGHTNING: Rows = {
    "LightningModule": "a torch module, a loss function and an optimizer: Learner(...)",
    "LightningDataModule": "DataLoaders(train, valid)",
    "Trainer(max_epochs=n).fit(model)": "fit(learner, state, n)",
    "max_steps": "fit(learner, state, steps=1000)  # schedules are spread over the steps",
    "val_check_interval, check_val_every_n_epoch=None": (
        "fit(learner, state, steps=1000, steps_per_epoch=100)  # an epoch is so many batches then"
    ),
    "trainer.validate, test": "validate(learner, state, data)",
    "trainer.predict": "predict(learner, state, data)",
    "configure_optimizers": "Learner(..., opt)  # schedules: ParamScheduler({...})",
    "training_step": "the loss of the Learner; a callback changes the batch, pred or loss",
    "manual optimization, several optimizers": (
        "partition({...}, labels)  # as in examples/gan.py; or value_and_grad in your own loop"
    ),
    "self.log": "RecordValues(...), or a metric of the Learner",
    "torchmetrics": "pass the metric object to Learner; TorchMetric(...)",
    "save_hyperparameters": "state.hyper  # is in every checkpoint",
    "fast_dev_run, overfit_batches": "SingleBatch(), overfit_one_batch(learner, state)",
    "limit_train_batches": "ShortEpoch(...)",
    "accumulate_grad_batches": "GradientAccumulation(...)",
    "gradient_clip_val": "GradientClip(...), or the rule clip_norm",
    "precision": "MixedPrecision(...)",
    "accelerator, devices": "learner.init(device=...)",
    "deterministic=True, seed_everything": (
        "learner.init(seed=0)  # and, for the first weights, torch.manual_seed(0) before the model"
    ),
    "find_unused_parameters": "nothing to set: a run warns of parameters without a gradient",
    "detect_anomaly": "TerminateOnNaN()",
    "profiler": "Profiler(...), Timer(...)",
    "logger": "TensorBoardLogger(...), CSVLogger(...), JSONLLogger(...), TrackerLogger(...)",
    "ckpt_path": "fit(..., resume=folder)",
    "Tuner.lr_find": "lr_find(learner, state)",
    "Tuner.scale_batch_size": (),
    "strategy": "parallel(learner)  # ddp; with shard and gathering: fsdp",
    "ModelCheckpoint": "Checkpoint(folder)  # to go on; SaveModel(path) for the best weights",
    "EarlyStopping": "EarlyStopping(...)",
    "LearningRateMonitor": "state.history.hypers  # always recorded",
    "LearningRateFinder": "lr_find(learner, state)",
    "StochasticWeightAveraging, WeightAveraging": "AverageParams(...), average_params(opt)",
    "GradientAccumulationScheduler": (),
    "BackboneFinetuning, BaseFinetuning": "Freeze(...), fine_tune(learner, state, epochs)",
    "ModelSummary, RichModelSummary": "summary(learner, state)",
    "TQDMProgressBar, RichProgressBar": "Progress()",
    "DeviceStatsMonitor, ThroughputMonitor": "Timer(...), Profiler(...)",
    "Timer": "Timer(...)  # measures; a limit of time is a callback that raises CancelFit",
    "ModelPruning, Prune, LambdaCallback": "a callback of your own",
    "on_fit_start, on_train_start": "before_fit",
    "on_train_epoch_start": "before_epoch, before_train",
    "on_train_batch_start": "before_batch",
    "on_before_zero_grad": "there is nothing to zero",
    "on_before_backward, on_after_backward": "before_backward, after_backward",
    "on_before_optimizer_step": "before_step",
    "on_train_batch_end": "after_batch",
    "on_validation_epoch_start, on_validation_epoch_end": "before_validate, after_validate",
    "on_train_epoch_end": "after_epoch",
    "on_fit_end": "after_fit",
    "on_exception": "around_fit  # a bracket: it is closed on every way out",
    "trainer.should_stop = True": "raise CancelFit",
}

TABLES = {"torch_optim": TORCH, "optax": OPTAX, "fastai": FASTAI, "lightning": LIGHTNING}


def exists(name: str) -> bool:
    """Whether one of our packages has it."""
    return any(hasattr(module, name) for module in OURS)


def names_in(text: str) -> set[str]:
    """The names that a line of code uses; none if it is a sentence."""
    code = text.split("  #")[0]
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return set()
    return {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in GIVEN
    }


def is_code(text: str) -> bool:
    """Whether it is to be shown as code."""
    return bool(re.match(r"[\w.]+(\(|,|$|  #)", text.replace(", ...", "")))


def here(row: str | tuple[str, ...]) -> str:
    """The first way to say it that exists, as Markdown; "none" if there is none."""
    for way in (row,) if isinstance(row, str) else row:
        if all(map(known, names_in(way))):
            code, _, remark = way.partition("  # ")
            if not is_code(way):
                return way
            return f"`{code}`" + (f": {remark}" if remark else "")
    return "none"


def known(name: str) -> bool:
    """Ours, or an argument, or an event of the loop."""
    return exists(name) or name in ARGUMENTS or name in loop.events() or name.startswith("around_")


ARGUMENTS = {
    *(
        "callback",
        "callbacks",
        "classes",
        "cycle_length",
        "cycles",
        "dampening",
        "data",
        "dict",
        "epochs",
    ),
    *("every", "folder", "grads", "high", "key", "labels", "like", "loss", "low", "metrics", "mom"),
    *("n", "nesterov", "optree", "params", "path", "pattern", "patterns", "step", "train", "tree"),
    *("valid", "wd"),
}
"""Words in the examples that stand for what the reader has."""


def table(title: str, rows: Rows) -> str:
    """Markdown: theirs, ours."""
    lines = [f"| {title} | here |", "|---|---|"]
    for theirs, row in rows.items():
        names = ", ".join(f"`{name}`" for name in theirs.split(", "))
        lines.append(f"| {names} | {here(row)} |".replace("`...`", "..."))
    return "\n".join([*lines, ""])


def public_names_of_optax() -> set[str]:
    """Its functions and classes, without its records of state and its types."""
    optax = importlib.import_module("optax")
    found = set()
    types = {"Params", "ScalarOrSchedule", "Schedule", "Updates", "WrappedSchedule"}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, value in vars(module).items():
            if name[0] == "_" or isinstance(value, ModuleType) or not callable(value):
                continue
            if name not in types and not re.search(
                r"(State|Fn|Node|Info|Transformation|ExtraArgs|Numbers)$", name
            ):
                found.add(prefix + name)
    return found


def schedulers_of_torch() -> set[str]:
    """All of them."""
    found = vars(torch.optim.lr_scheduler)
    return {name for name in found if re.fullmatch(r"[A-Z][a-z]\w*(LR|Restarts|Scheduler)", name)}
