"""Other projects' checkpoints and conventions, in this project's modules.

    project = project_of(config, shapes)     # {"model_type": ...}, {their name: shape}
    model = PROJECTS[project].build(config, state, np.float32)

One small file a project: a table of names, `matches(config, shapes)`, `config_of(config, shapes)`,
`state_of(state, our_config)`, which reads a tensor when it is asked for, and `build`. There is no
second forward: all run through the modules of miniflamingo.
"""

from miniflamingo.interop import (
    clip,
    efficientnet,
    flamingo_pytorch,
    idefics,
    llama,
    loading,
    mllama,
    mpt,
    open_flamingo,
    opt,
)

PROJECTS = {  # the first that matches is the one
    "idefics": idefics,
    "mllama": mllama,
    "open_flamingo": open_flamingo,
    "flamingo_pytorch": flamingo_pytorch,
    "efficientnet": efficientnet,
    "llama": llama,
    "mpt": mpt,
    "opt": opt,
    "clip": clip,
}


def project_of(config, shapes):
    """The name in PROJECTS of a checkpoint, by its config (a dict) and {name: shape}.

    ValueError where it is none of them, or lacks what its config says it is.
    """
    for name, module in PROJECTS.items():
        if module.matches(config, shapes):
            return name
    kind = config.get("model_type", "unknown")
    for name, module in PROJECTS.items():
        if kind in getattr(module, "MODEL_TYPES", (name,)):
            what = getattr(module, "EMBEDDING", "tensor by which it is known")
            raise ValueError(f"the config says {kind!r}, but there is no {what}")
    raise ValueError(f"a checkpoint of {kind!r} is of none of {', '.join(PROJECTS)}")


def config_of(name, config, shapes):
    """Our config of a checkpoint of the project `name`, by its config (a dict) and {name: shape}.

    ValueError that names a field which is missing, or is of the wrong kind, or says what we cannot.
    """
    return PROJECTS[name].config_of(loading.checked(config), shapes)
