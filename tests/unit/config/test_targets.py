"""Claims about the allow-list: known ways to run code are refused as text, aliases of foreign objects when resolved."""

import sys
import textwrap
from pathlib import Path

import pytest

from tinylmm.config.checks import check_targets
from tinylmm.config.targets import Role, check_target, check_trust, resolve_target
from tinylmm.errors import ConfigError

ROLES: tuple[Role, ...] = ("llm", "vision_tower", "encoder", "connector", "data")

HOSTILE = [
    "os.system", "os.popen", "os.execv", "os.spawnl", "os.remove", "posix.system", "subprocess.Popen",
    "subprocess.call", "subprocess.run", "subprocess.check_output", "builtins.eval", "builtins.exec",
    "builtins.__import__", "builtins.open", "builtins.compile", "builtins.getattr", "__builtin__.eval", "eval",
    "exec", "pty.spawn", "platform.popen", "commands.getoutput", "shutil.rmtree", "shutil.move",
    "pathlib.Path.unlink", "pathlib.Path.write_text", "pickle.loads", "pickle.load", "marshal.loads", "dill.loads",
    "cloudpickle.loads", "joblib.load", "shelve.open", "yaml.unsafe_load", "numpy.load", "importlib.import_module",
    "imp.load_source", "runpy.run_path", "runpy.run_module", "pkgutil.resolve_name", "zipimport.zipimporter",
    "code.interact", "ctypes.CDLL", "ctypes.cdll.LoadLibrary", "cffi.FFI", "gc.get_objects", "inspect.getsource",
    "sys.exit", "os._exit", "os.abort", "socket.socket", "urllib.request.urlopen", "http.client.HTTPConnection",
    "webbrowser.open", "antigravity.webbrowser.open", "site.addsitedir", "pip.main",
    "asyncio.create_subprocess_shell", "multiprocessing.Process", "threading.Thread",
    "concurrent.futures.ProcessPoolExecutor", "timeit.timeit", "functools.partial", "functools.reduce",
    "operator.methodcaller", "types.FunctionType", "types.CodeType", "unittest.mock.patch", "sqlite3.connect",
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "omegaconf.OmegaConf.load",
    "torch.load", "torch.save", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.jit.load",
    "torch.package.PackageImporter", "torch.compile", "torch.ops.load_library", "torch.classes.load_library",
    "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline", "torch._C._jit_init",
    "torch.distributed.run.main", "torch.serialization.os.system", "torch.nn.modules.module.torch.hub.load",
    "torch.nn.functional.os", "torch.os.system", "torch.nn.Module.load_state_dict",
    "torch.nn.modules.module._global_forward_hooks", "torch.multiprocessing.spawn",
    "torch.nn.init.warnings.sys.exit", "transformers.pipeline", "transformers.pipelines.pipeline",
    "transformers.AutoModel.from_pretrained", "transformers.AutoModelForCausalLM",
    "transformers.AutoModelForCausalLM.from_pretrained", "transformers.PhiForCausalLM.from_pretrained",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "transformers.utils.import_utils.subprocess.Popen", "transformers.tools.PythonInterpreterTool",
    "transformers.Trainer", "transformers.commands.run.RunCommand",
    "transformers.models.phi.modeling_phi.os.system", "transformers.models.auto.AutoModelForCausalLM",
    "transformers.agents.Agent", "tinylmm.cli.train.main", "tinylmm.launch.worker.main",
    "tinylmm.config.targets.resolve_target", "tinylmm.models.vision.torch.load", "tinylmm.models.__init__.X",
    "tinylmm.models._hidden.Model", "tinylmm.models.vision.HFVisionTower.__init__",
    "tinylmm.data.sample.Path.unlink",
]  # fmt: skip

SPELLINGS = [
    "",
    " ",
    ".",
    "..",
    "os",
    "os.",
    ".os.system",
    "os..system",
    " os.system",
    "os.system ",
    "os.system\n",
    "os.system\x00",
    "os:system",
    "os/system",
    "OS.SYSTEM",
    "ｏｓ.system",
    "os．system",
    "o\u0073.syſtem",
    "os.system()",
    "os.system; x",
    "torch.nn.Linear\n",
    "torch.nn.Linear ",
    " torch.nn.Linear",
    "torch.nn..Linear",
    "torch.nn.Linear.",
    "torch.nn.Linear.__class__",
    "torch.nn.Lin\u0435ar",
    "torch/nn/Linear",
    "torch.nn.Linear\x00",
    "torch.nn.__class__",
    "torch.nn._Linear",
    "tinylmm.models.connectors.MLPConnector.forward",
    "tinylmm.models.connectors.__class__",
    "tinylmm.models..connectors.MLPConnector",
    "tinylmm.models.connectors.MLPConnector\n",
    "tinylmm.Models.connectors.MLPConnector",
    "tinylmmx.models.connectors.MLPConnector",
    "tinylmm.models.../../evil.Model",
    "transformersx.PhiForCausalLM",
    "transformers.PhiForCausalLM\n",
    "file:///tmp/x.Model",
    "transformers." + "a" * 500 + ".XForCausalLM",
    "__main__.Model",
    "__builtins__.eval",
    "lambda: 1",
    "getattr(os, 'system')",
]


@pytest.mark.parametrize("target", [*HOSTILE, *SPELLINGS], ids=ascii)
def test_a_hostile_target_is_refused_in_every_role_without_an_import(target: str) -> None:
    before = set(sys.modules)
    assert all(check_target(target, (), role) for role in ROLES)
    assert set(sys.modules) == before


@pytest.mark.parametrize("target", [target for target in HOSTILE if target.split(".")[0] in sys.stdlib_module_names])
def test_trust_does_not_open_the_standard_library(target: str) -> None:
    assert all(check_target(target, (target.split(".")[0],), role) for role in ROLES)


@pytest.mark.parametrize(
    ("role", "target"),
    [
        ("llm", "transformers.PhiForCausalLM"),
        ("llm", "transformers.models.llama.modeling_llama.LlamaForCausalLM"),
        ("llm", "transformers.GPT2LMHeadModel"),
        ("encoder", "transformers.SiglipVisionModel"),
        ("vision_tower", "tinylmm.models.vision.HFVisionTower"),
        ("connector", "tinylmm.models.connectors.MLPConnector"),
        ("connector", "torch.nn.Linear"),
        ("connector", "mypackage.parts.MyConnector"),
        ("data", "mypackage.scenes.build"),
    ],
    ids=str,
)
def test_a_part_of_an_allowed_package_is_accepted(role: Role, target: str) -> None:
    assert check_target(target, ("mypackage",), role) is None


@pytest.mark.parametrize(
    "package", ["os", "sys", "builtins", "os.path", "__main__", "", "../x", "My", "a b", "subprocess"]
)
def test_trust_refuses_what_is_no_plain_foreign_package(package: str) -> None:
    assert check_trust(package)


@pytest.mark.parametrize(
    ("role", "target", "meant"),
    [
        ("llm", "transformers.PhiForCasualLM", "PhiForCausalLM"),
        ("llm", "transformers.LamaForCausalLM", "LlamaForCausalLM"),
        ("encoder", "transformers.SiglipVisonModel", "SiglipVisionModel"),
        ("connector", "tinylmm.models.connectors.MPLConnector", "MLPConnector"),
    ],
)
def test_a_misspelt_class_gets_a_suggestion(role: Role, target: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in str(check_target(target, (), role))


@pytest.mark.parametrize(
    "place",
    [
        {"llm": {"architecture": {"_target_": "os.system"}}},
        {"connector": {"options": {"inner": [{"_target_": "tinylmm.models.connectors.MLPConnector"}]}}},
        {"connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "_partial_": True}},
        {"connector": {"_args_": ["x"]}},
        {"trainer": {"x": {"_target_": "torch.nn.Linear"}}},
        {"data": {"build": {"options": {"_target_": "os.system"}}}},
        {"eval": {"x": {"data": {"build": {"_target_": "os.system"}}}}},
        {"llm": {"architecture": {"auto_map": {"AutoModel": "evil.Model"}}}},
        {"llm": {"architecture": {"trust_remote_code": True}}},
        {"vision_tower": {"architecture": {"_attn_implementation_internal": "hub/kernel"}}},
        {"vision_tower": {"build": {"text_tower": {"attn_implementation": "someone/kernel"}}}},
    ],
    ids=str,
)
def test_no_mapping_smuggles_a_target_or_a_field_that_chooses_code(place: dict[str, object]) -> None:
    assert len(check_targets(place)) == 1


def test_an_alias_of_a_foreign_object_in_a_trusted_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lentparts").mkdir()
    source = """
        from subprocess import Popen as Model
        from os import system as build
        class Real: pass
        instance = Real()
        def make(): pass
    """
    (tmp_path / "lentparts" / "__init__.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_target("lentparts.Real", ("lentparts",), role="connector").__name__ == "Real"
    assert resolve_target("lentparts.make", ("lentparts",), role="data").__name__ == "make"
    for alias in ("Model", "build", "instance", "missing"):
        with pytest.raises(ConfigError):
            resolve_target(f"lentparts.{alias}", ("lentparts",), role="data")
    with pytest.raises(ConfigError, match=r"not derived from builtins\.dict"):
        resolve_target("lentparts.Real", ("lentparts",), dict, role="connector")
