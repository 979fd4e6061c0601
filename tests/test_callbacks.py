"""Callbacks of transformers' and Lightning's trainers: real evaluations, compared with a sweep."""

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import current_device, here
from models import Mlp, images, loader, settled
from torch import nn
from torch.utils.data import DataLoader

import neusemslice as nss

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
LightningProfiler = nss.profiling.LightningProfiler
TrainerProfiler = nss.profiling.TrainerProfiler

BATCHES = loader(18, shape=(12,))
SAMPLES = [
    {"x": x, "labels": y} for xs, ys in BATCHES for x, y in zip(xs, ys.tolist(), strict=True)
]


def assert_same_bits(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def hooked(model, besides=None):
    """Modules that carry a forward hook of any kind."""
    return [
        m
        for m in model.modules()
        if m is not besides and (m._forward_hooks or m._forward_pre_hooks)
    ]


class Classifier(nn.Module):
    """An Mlp that is called as transformers' models are, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = settled(Mlp(), 12)
        self.failing = False

    def forward(self, x, labels=None):
        logits = self.mlp(x)
        if self.failing:
            raise OSError("the model fails")
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Samples(torch.utils.data.Dataset):
    """The samples; reading the last one fails when told to."""

    def __init__(self, samples=SAMPLES) -> None:
        self.samples, self.failing = samples, False

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if self.failing and index == len(self) - 1:
            raise OSError("the data fail")
        return self.samples[index]


def trainer(observer, folder, model=None, data=None, **arguments):
    settings = {
        "output_dir": str(folder),
        "per_device_eval_batch_size": 7,
        "per_device_train_batch_size": 7,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": current_device().type == "cpu",
    }
    return transformers.Trainer(
        Classifier() if model is None else model,
        transformers.TrainingArguments(**settings | arguments),
        train_dataset=Samples(),
        eval_dataset=Samples() if data is None else data,
        callbacks=[observer],
    )


@pytest.mark.usefixtures("device")
class TestTrainer:
    def test_evaluation_equals_a_sweep(self, tmp_path):
        observer = TrainerProfiler()
        own = trainer(observer, tmp_path)
        own.evaluate()
        assert_same_bits(observer.profile, nss.profile(Classifier(), named(), ("avg",)))

    def test_a_transformer_with_padded_sequences(self, tmp_path):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            num_labels=3,
        )
        model = here(transformers.BertForSequenceClassification(config))
        generator = torch.Generator().manual_seed(0)
        samples = [
            {
                "input_ids": torch.randint(1, 30, (6,), generator=generator),
                "attention_mask": (torch.arange(6) < 2 + i % 5).long(),
                "labels": i % 3,
            }
            for i in range(10)
        ]
        batches = [
            {
                name: torch.stack([torch.as_tensor(sample[name]) for sample in part])
                for name in part[0]
            }
            for part in (samples[:7], samples[7:])
        ]
        observer = TrainerProfiler(sites=["*intermediate*"])
        trainer(observer, tmp_path, model, Samples(samples)).evaluate()
        expected = nss.profile(model, batches, ("avg",), sites=["*intermediate*"])
        assert_same_bits(observer.profile, expected)
        positions = sum(int(batch["attention_mask"].sum()) for batch in batches)
        site = next(iter(observer.profile.activations.values()))
        assert site.positions.sum() == positions

    def test_training_leaves_the_profile_of_its_last_evaluation(self, tmp_path):
        observer = TrainerProfiler(("avg", "var"), class_names=["a", "b", "c", "d"])
        own = trainer(
            observer, tmp_path, eval_strategy="epoch", num_train_epochs=2, learning_rate=1e-2
        )
        before = copy.deepcopy(own.model.state_dict())
        own.train()
        assert not torch.equal(own.model.mlp.first.weight, before["mlp.first.weight"])
        observer.close()
        expected = nss.profile(own.model, named(), ("avg", "var"), class_names=["a", "b", "c", "d"])
        assert_same_bits(observer.profile, expected)

    def test_each_evaluation_has_a_profile_of_its_own(self, tmp_path):
        observer = TrainerProfiler()
        own = trainer(observer, tmp_path)
        own.evaluate()
        first = observer.profile
        with torch.no_grad():
            own.model.mlp.first.bias.add_(1)
        own.evaluate()
        assert observer.profile.samples.tolist() == first.samples.tolist() == [5, 5, 4, 4]
        assert not torch.equal(
            observer.profile.activations["mlp.first"].mean, first.activations["mlp.first"].mean
        )

    def test_prediction_is_observed_where_data_are_labelled(self, tmp_path):
        observer = TrainerProfiler()
        own = trainer(observer, tmp_path)
        own.predict(Samples([{"x": sample["x"]} for sample in SAMPLES]))
        with pytest.raises(RuntimeError, match="TrainerProfiler: no evaluation has been observed"):
            _ = observer.profile
        own.predict(Samples())
        assert_same_bits(observer.profile, nss.profile(Classifier(), named(), ("avg",)))

    def test_other_calls_and_copies_of_the_model_do_not_count(self, tmp_path):
        observer = TrainerProfiler()
        own = trainer(observer, tmp_path)
        x, labels = here(images(3, 12)), here(torch.zeros(3, dtype=torch.int64))
        own.model.eval()
        own.model(x, labels=labels)
        copy.deepcopy(own.model)(x, labels=labels)
        own.evaluate()
        own.model(x, labels=labels)
        assert observer.profile.samples.tolist() == [5, 5, 4, 4]
        own.evaluate()
        assert observer.profile.samples.tolist() == [5, 5, 4, 4]

    def test_labels_under_another_name(self, tmp_path):
        class Other(Classifier):
            def forward(self, x, target=None):
                return super().forward(x, target)

        observer = TrainerProfiler(labels=lambda call: call.get("target"))
        data = Samples([{"x": s["x"], "target": s["labels"]} for s in SAMPLES])
        trainer(observer, tmp_path, Other(), data, label_names=["target"]).evaluate()
        assert_same_bits(observer.profile, nss.profile(Classifier(), named(), ("avg",)))

    def test_hooks_go_whatever_happens(self, tmp_path):
        observer, data = TrainerProfiler(), Samples()
        own = trainer(observer, tmp_path, data=data)
        own.evaluate()
        assert hooked(own.model, besides=own.model) == []
        own.model.failing = True
        with pytest.raises(OSError, match="the model fails"):
            own.evaluate()
        assert hooked(own.model, besides=own.model) == []
        own.model.failing, data.failing = False, True
        with pytest.raises(OSError, match="the data fail"):
            own.evaluate()
        assert hooked(own.model, besides=own.model) == []
        observer.close()
        assert hooked(own.model) == []

    def test_an_interrupt_leaves_nothing_behind(self, tmp_path):
        def interrupted(**call):
            Classifier.forward(own.model, **call)
            raise KeyboardInterrupt

        observer = TrainerProfiler()
        own = trainer(observer, tmp_path)
        own.evaluate()
        own.model.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            own.evaluate()
        del own.model.forward
        own.evaluate()
        assert observer.profile.samples.tolist() == [5, 5, 4, 4]
        assert hooked(own.model, besides=own.model) == []

    def test_hooks_go_with_the_callback(self):
        model, observer = Classifier(), TrainerProfiler()
        observer.on_init_end(SimpleNamespace(torch_compile=False), None, None, model=model)
        assert hooked(model) == [model]
        del observer
        assert hooked(model) == []

    def test_an_evaluation_that_did_not_finish_is_not_mixed_with_the_next(self, tmp_path):
        observer, data = TrainerProfiler(), Samples()
        own = trainer(observer, tmp_path, data=data)
        data.failing = True
        with pytest.raises(OSError, match="the data fail"):
            own.evaluate()
        data.failing = False
        with pytest.raises(RuntimeError, match="the evaluation before this one did not finish"):
            own.evaluate()
        own.evaluate()
        assert observer.profile.samples.tolist() == [5, 5, 4, 4]

    def test_a_model_that_is_called_twice_in_a_step(self, tmp_path):
        class Twice(transformers.Trainer):
            def compute_loss(self, model, inputs, **options):
                model(**inputs)
                return super().compute_loss(model, inputs, **options)

        arguments = trainer(TrainerProfiler(), tmp_path).args
        own = Twice(Classifier(), arguments, eval_dataset=Samples(), callbacks=[TrainerProfiler()])
        with pytest.raises(RuntimeError, match="called with labels more than once in one step"):
            own.evaluate()

    def test_an_evaluation_without_labels(self, tmp_path):
        data = Samples([{"x": sample["x"]} for sample in SAMPLES])
        with pytest.raises(RuntimeError, match="no batch with labels was observed"):
            trainer(TrainerProfiler(), tmp_path, data=data).evaluate()

    def test_a_compiled_model_is_refused(self, tmp_path):
        model = Classifier()
        model.mlp.compile()
        with pytest.raises(ValueError, match="TrainerProfiler: the model must not be compiled"):
            trainer(TrainerProfiler(), tmp_path, model)
        arguments = SimpleNamespace(torch_compile=True)
        with pytest.raises(ValueError, match="TrainerProfiler: the model must not be compiled"):
            TrainerProfiler().on_init_end(arguments, None, None, model=Classifier())


def named():
    return [{"x": x, "labels": y} for x, y in BATCHES]


class Module(pl.LightningModule):
    """A Lightning module around an Mlp; its validation fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = settled(Mlp(), 12)
        self.failing = False

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self(batch[0])
        if self.failing:
            raise OSError("the model fails")

    def test_step(self, batch, index):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning(observer, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            callbacks=[observer],
            **options,
        )


def data():
    return DataLoader(BATCHES, batch_size=None)


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    @pytest.mark.parametrize("kind", ["validate", "test"])
    @pytest.mark.parametrize("inference_mode", [True, False])
    def test_evaluation_equals_a_sweep(self, kind, inference_mode, tmp_path):
        observer, module = LightningProfiler(), Module()
        own = lightning(observer, tmp_path, inference_mode=inference_mode)
        getattr(own, kind)(module, data(), verbose=False)
        expected = nss.profile(module, BATCHES, ("avg",))
        assert_same_bits(observer.profile, expected)
        assert hooked(module) == []
        # Statistics that were gathered in inference mode can still be merged.
        observer.profile.merge(expected)

    def test_a_part_of_the_module(self, tmp_path):
        module = Module()
        observer = LightningProfiler(("avg", "var"), model=module.net)
        lightning(observer, tmp_path).validate(module, data(), verbose=False)
        assert_same_bits(observer.profile, nss.profile(module.net, BATCHES, ("avg", "var")))

    def test_fitting_leaves_the_profile_of_its_last_validation(self, tmp_path):
        observer, module = LightningProfiler(), Module()
        before = module.net.first.weight.detach().clone()
        lightning(observer, tmp_path, max_epochs=2).fit(module, data(), data())
        assert not torch.equal(module.net.first.weight, before)
        assert_same_bits(observer.profile, nss.profile(module, BATCHES, ("avg",)))

    def test_the_sanity_check_is_not_observed(self, tmp_path):
        observer, module = LightningProfiler(), Module()
        own = lightning(observer, tmp_path, max_epochs=1, limit_val_batches=1)
        own.fit(module, data(), data())
        assert observer.profile.samples.sum() == len(BATCHES[0][0])

    def test_a_compiled_module(self, tmp_path):
        observer, module = LightningProfiler(), Module()
        module.net.compile(backend="aot_eager")
        module(images(2, 12))
        lightning(observer, tmp_path).validate(module, data(), verbose=False)
        expected = nss.profile(Module(), BATCHES, ("avg",))
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(observer.profile.state_dict()[name], tensor)
        torch.compiler.reset()

    def test_hooks_go_whatever_happens(self, tmp_path):
        observer, module = LightningProfiler(), Module()
        module.failing = True
        with pytest.raises(OSError, match="the model fails"):
            lightning(observer, tmp_path).validate(module, data(), verbose=False)
        assert hooked(module) == []
        module.failing = False
        with pytest.raises(TypeError, match="LightningProfiler: batch 1 must be"):
            lightning(observer, tmp_path).validate(
                module, DataLoader([BATCHES[0], [BATCHES[1][0]]], batch_size=None), verbose=False
            )
        assert hooked(module) == []
        with pytest.raises(RuntimeError, match="no evaluation has been observed"):
            _ = observer.profile
        lightning(observer, tmp_path).validate(module, data(), verbose=False)
        assert_same_bits(observer.profile, nss.profile(module, BATCHES, ("avg",)))


@pytest.mark.parametrize("make", [TrainerProfiler, LightningProfiler])
def test_metrics_that_need_gradients_are_refused(make):
    with pytest.raises(
        ValueError, match=rf"{make.__name__}: metrics must be among \('avg', 'var'\), because"
    ):
        make(("avg", "taylor"))


@pytest.mark.slow
def test_frameworks_are_imported_only_for_their_callbacks():
    program = """
import sys
for name in ("lightning", "pytorch_lightning", "transformers"):
    sys.modules[name] = None
import neusemslice as nss
for name in ("TrainerProfiler", "LightningProfiler"):
    try:
        getattr(nss.profiling, name)
    except ImportError:
        continue
    raise SystemExit(f"{name} without its framework")
import types
new = types.ModuleType("lightning.pytorch")
new.Callback = type("Callback", (), {})
sys.modules |= {"lightning": types.ModuleType("lightning"), "lightning.pytorch": new}
assert issubclass(nss.profiling.LightningProfiler, new.Callback)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
