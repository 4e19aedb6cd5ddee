"""Tests that a wrong command is refused in one line before anything happens, and that a right one becomes cells."""

import csv
import gzip
import importlib.util
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from run_folders import FACTS
from train_processes import ROOT, TRAIN, run_script

from moe.checks import ConfigError, parse
from moe.config.cell import Cell
from moe.config.classes import locate
from moe.config.effect import Effect
from moe.config.keys import flatten, is_free
from moe.config.options import CONF, GROUPS, SEARCH_PATH, options, router_spec
from moe.config.schema import Config
from moe.launch import command_line
from moe.launch.cells import SayThatTorchLoads, _with_keys_that_exist, expand
from moe.launch.command_line import read_cells
from moe.launch.compose import compose_config, composing, typed
from moe.launch.explain import CLAIM
from moe.launch.groups import FilesReadOnce
from moe.launch.hints import HINTS
from moe.launch.option_files import default_of
from moe.launch.overrides import parse_override
from moe.launch.resolvers import SHIPPED, run_name, seeds_in
from moe.launch.run import write_run_record
from moe.planning.plan import Request, free_seeds, pilot_command
from moe.results.shipped import RUNS
from moe.runs.folder import difference, finished
from moe.runs.record import RunFacts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("seed=abc", "^seed=abc: must be a whole number$"),
        ("noise=-1", r"noise=-1.0: must be a finite number >= 0"),
        ("noise=nan", "noise=nan: must be a finite number"),
        ("lb=inf", "lb=inf: must be a finite number"),
        ("capacity=0", "^capacity=0.0: must be a number > 0, or null for no limit$"),
        ("noise=1e39", r"^noise=1e\+39: must be 0, or between 1.2e-38 and 3.4e\+38 in size, as 32-bit numbers are$"),
        ("lb=1e-46", "^lb=1e-46: must be 0, or between"),
        ("router=temperature router.temp=1e-46", "^router.temp=1e-46: must be 0, or between"),
        ("data.cache=''", "^data.cache=: must be a path$"),
        ("data.tokenizer='' data.vocab_size=null", "^data.tokenizer=: must be bpe, a folder, or a name on the hub$"),
        ("out=''", "^out=: must be a path$"),
        ("data.source={}", r"^data.source={}: an object without keys changes nothing; set the keys"),
        ("model=dense router=hash", "^router=hash: must be left out, because no layer of this model is a Mixture"),
        ("model=dense schedule=linear router=temperature", "^schedule=linear: must be left out, because no layer"),
        ("-m model=dense router=topk,hash", "^router=topk,hash: must be left out, because no layer of this model"),
        ("nois=1", "unknown key 'nois'; nearest: noise"),
        ("router.kk=2", "unknown key of router=topk 'router.kk'; nearest: router.k"),
        ("router.temp=2", "^router=topk has no key temp; router=gumbel, router=temperature have it$"),
        ("-m noise=0.1 router.temp=1.5,2", "^router=topk has no key temp; router=gumbel, router=temperature have it$"),
        ("data.source.paths=[a]", "^data=embedded has no key source.paths; data=text has it$"),
        ("router.zzz=2", "^unknown key of router=topk 'router.zzz'; known: router._target_, router.gate, router.k$"),
        ("temp=2", "^unknown key 'temp'; write router.temp, with router=temperature or router=gumbel$"),
        ("lr=0.1", "^unknown key 'lr'; write optimizer.muon_lr for matrices and optimizer.adamw_lr for the rest$"),
        (
            "optimizer.lr=0.1",
            "^unknown key of optimizer=muon 'optimizer.lr'; write optimizer.muon_lr for matrices and",
        ),
        ("load_balancing_weight=0.1", "^unknown key 'load_balancing_weight'; write lb$"),
        ("lb-weight=0.1", "^unknown key 'lb-weight'; write lb$"),
        ("cf=1.25", "^unknown key 'cf'; write capacity$"),
        ("top_k=2", "^unknown key 'top_k'; write router.k$"),
        ("router.top_k=2", "^unknown key of router=topk 'router.top_k'; write router.k$"),
        ("router.temperature=2", "'router.temperature'; write router.temp, with router=temperature or router=gumbel$"),
        (
            "device=cuda",
            "^unknown key 'device'; write CUDA_VISIBLE_DEVICES= in front of the command to stay on",
        ),
        ("data.paths=[a]", "^unknown key of data=embedded 'data.paths'; write data.source.paths, with data=text$"),
        ("model.hidden_size=9", "^unknown key of model=tiny 'model.hidden_size'; write model.dim$"),
        ("experment=default", "^unknown key 'experment'; nearest: experiment$"),
        ("router=top1", "^unknown option of router 'top1'; there is variant=top1$"),
        ("schedule=exp", "^unknown option of schedule 'exp'; nearest: exponential$"),
        ("noise=[0,0.1]", r"^noise=\[0,0.1\]: must be a number; for several values in a sweep write -m noise=0,0.1$"),
        ("router topk", "^cannot read the command line: router: write router=OPTION$"),
        ("--steps 30", "^--steps: write steps=30, without --$"),
        ("--router topk", "^--router: write router=topk, without --$"),
        ("optimizer.zzz=1", "'optimizer.zzz'; known: optimizer.adamw_lr, optimizer.beta1, .*optimizer.weight_decay$"),
        ("zzz=1", "^unknown key 'zzz'; `--cfg job` prints all keys$"),
        ("--noise=0.1", "^--noise=0.1: write noise=0.1, without --$"),
        ("--noise 0.1", "^--noise: write noise=0.1, without --$"),
        ("--optimizer.clip=2 seed=1", "^--optimizer.clip=2: write optimizer.clip=2, without --$"),
        ("-m noise=0.0,0.1, seed=42", "^noise=0.0,0.1,: a value is missing after the last comma$"),
        ("-m noise=0.0,,0.1", "^noise=0.0,,0.1: a value is missing between two commas$"),
        ("capacity=none", "^capacity=none: must be a number > 0, or null for no limit$"),
        ("steps=1e2", "^steps=1e2: must be a whole number$"),
        ("-m steps=10,1e2", "^steps=1e2: must be a whole number$"),
        ("noise=lots", "^noise=lots: must be a number$"),
        ("seed=${lb}", "^seed: must be a whole number$"),
        ("compile=ja", "^compile=ja: must be true or false$"),
        ("optimizer.muon_lr=x", "^optimizer.muon_lr=x: must be a number or null$"),
        ("claims=3", "^claims=3: must be a list of objects$"),
        ("out=[1]", r"^out=\[1\]: must be text or null$"),
        ("hydra/launcher=joblib -m hydra.launcher.n_jobs=x", "^hydra.launcher.n_jobs=x: must be a whole number$"),
        (
            "router=soft_moe data=smoltalk",
            "router._target_=moe.routers.soft_moe.SoftMoE: must be a router that keeps the conversations of a block",
        ),
        ("router=topq", "unknown option of router 'topq'; nearest: top"),
        ("router=0.1", "^unknown option of router '0.1'; --help lists all$"),
        ("router={a:1}", "unknown option of router"),
        ("router=temperature router.temp=0", r"router.temp=0.0: must be a finite number > 0"),
        ("router.k=9", r"router.k=9: must be between 1 and model.num_experts=8"),
        ("router.k=two", "router.k=two: must be a whole number"),
        ("router.gate=renor", "router.gate=renor: must be one of renorm, softmax_all, uniform"),
        ("model.heads=5", r"model.heads=5: must be a divisor of model.dim=128"),
        ("model.shared_gate=true", "^model.shared_gate=True: must be false without model.shared_experts$"),
        (
            "model.latent_dim=128",
            "^model.latent_dim=128: must be null, or a whole number from 1 to 127, below model.dim$",
        ),
        (
            "model.router_precision=fp16",
            "^model.router_precision=fp16: must be one of fp32, bf16_weights, bf16; nearest: bf16$",
        ),
        (
            "model.router_precision=bf16 router=hash",
            "^model.router_precision=bf16: must be fp32, because this router only looks experts up$",
        ),
        (
            "model.router_precision=bf16_weights router=running_means",
            "^model.router_precision=bf16_weights: must be fp32 or bf16, because this router has no parameters",
        ),
        ("model.router_input=attn", "^model.router_input=attn: must be one of feed_forward, attention; nearest: atten"),
        ("model.latent_dim=8 erc=0.1", "^erc=0.1: must be 0 unless routers and experts read the same vectors"),
        ("model.router_input=attention erc=0.1", "^erc=0.1: must be 0 unless routers and experts read the same"),
        (
            "model.router_input=attention router=moe_plus_plus",
            "^model.router_input=attention: must be feed_forward, because this router adds a share of what it reads",
        ),
        ("precision=fp16", "precision=fp16: must be one of fp32, bf16, auto; nearest: bf16"),
        ("matmul_precision=hi", "matmul_precision=hi: must be one of highest, high, medium; nearest: high"),
        ("steps=-1", "steps=-1: must be a whole number"),
        ("steps=100000000000000000000", "steps=1.*: must be a whole number"),
        ("seed=-1", "seed=-1: must be between"),
        (
            "+extra=1",
            r"\+extra=1: keys can be added and deleted only in router, .*, adapter.router; set",
        ),
        ("data.source=null", "data.source=None: must name its class as data.source._target_"),
        ("-m experiment=noise_floor,noise_lb_seed", "a command has one experiment"),
        ("-m out=a,b seed=1,2", "a command has one out"),
        (
            "router=expert_choice router.k=1",
            "^router=expert_choice has no key k; router=balanced_random, .*, and [0-9]+ in all have it$",
        ),
        ("router@x=topk", "router@x=topk: a group cannot be moved; write router="),
        ("model=upcycled", "model.dense=null: must be the folder or hub name of a checkpoint"),
        (
            "++stepz=5",
            r"\+\+stepz=5: keys can be added and deleted only in router, .*, adapter.router; set",
        ),
        ("~seed", "~seed: keys can be added and deleted only in router"),
        ("noise=null", "^noise=null: must be a number$"),
        ("lb=[1]", r"^lb=\[1\]: must be a number$"),
        ("seed=1,2", "seed=1,2: several values need a sweep; add -m"),
        ("seeds=1,2", "^unknown key 'seeds'; write seed$"),
        (
            "--lr=0.1",
            "^--lr=0.1: write optimizer.muon_lr for matrices and optimizer.adamw_lr for the rest, as key=value ",
        ),
        ("--lr 0.1", "^--lr: write optimizer.muon_lr for matrices and optimizer.adamw_lr for the rest, as key=value "),
        ("router=a.b.C", "^unknown option of router 'a.b.C'; for a class write router._target_=a.b.C$"),
        ("data=a.b.C", "^unknown option of data 'a.b.C'; for a class write data.source._target_=a.b.C$"),
        (
            "router=manhattan",
            "'manhattan'; name a folder that holds router/manhattan.yaml by --config-dir or MOE_SEARCH_",
        ),
        ("router.target=a.B", "router=relu have it; or write router._target_ for a class$"),
        (
            "schedule.target=a.B",
            "^unknown key of schedule=constant 'schedule.target'; write schedule._target_ for a class",
        ),
        ("data.source.path=x", "data=smoltalk have it; or write data.source.paths, with data=text$"),
        ("+router._target_=a.B", r"^\+router._target_=a.B: write router._target_=a.B, without \+$"),
        (
            "-m router={_target_:a.B},topk",
            "^router={_target_:a.B}: a sweep of classes is written as router._target_=A,B",
        ),
        ("-m hydra/launcher=job", "^hydra/launcher=job: must be one of basic, joblib, .*; nearest: joblib$"),
        ("claims=[{text:a}]", r"^claims\[0\].metric: required, for example 'claims=\[{text: "),
        (
            "-m model.dense_ffn=64,77",
            "^model.dense_ffn=64,77: changes nothing, because no layer of this model is dense;",
        ),
        ("-m variant=dense model.ffn=64,77", "^model.ffn=64,77: changes nothing, .* is a Mixture of Experts; leave it"),
        ("-m variant=dense model.num_experts=4,8", "^model.num_experts=4,8: changes nothing, because no layer"),
        ("-m variant=dense model.shared_experts=0,1", "^model.shared_experts=0,1: changes nothing, because no layer"),
        ("-m variant=dense optimizer=adamw optimizer.router_lr=0.1,0.2", "^optimizer.router_lr=0.1: no layer of this"),
        ("-m variant=dense optimizer=adamw optimizer.experts_lr=0.1,0.2", "^optimizer.experts_lr=0.1: no layer of th"),
        (
            "-m variant=null,dense model.ffn=64,77",
            "run: model.ffn=64 and model.ffn=77, both with variant=dense; leave one out",
        ),
        (
            "-m router=temperature schedule=constant,linear schedule.start=1.0",
            "are the same run: .*schedule=constant.* and .*schedule=linear",
        ),
        (
            "-m router=temperature schedule=step schedule.first=0.5 schedule.second=0.5 schedule.middle=2,3",
            "are the same run: .*schedule.middle=2.* and .*schedule.middle=3",
        ),
        ("-m seed=1,1", "^seed=1,1: two of these values are the same; leave one out$"),
        ("-m noise=0,-1", "noise=-1.0: must be"),
        ("-m router.k=2,9", r"router.k=9: must be"),
        ("schedule=linear", "this router has no temperature; use router=temperature or router=gumbel"),
        ("router=temperature router.temp=hot", "router.temp=hot: must be a number"),
        ("schedule=exponential schedule.knob=noise", r"noise=0.0: must be > 0"),
        ("router=temperature schedule=step schedule.first=0.9", "schedule.first=0.9: must be 0 <= first <= second"),
        ("data.vocab_size=null", "data.vocab_size=null: must be a whole number, because data.tokenizer=bpe is trained"),
        ("data=text", r"^data.source.paths: required, for example 'data.source.paths=\[notes/\*.txt\]'$"),
        ("data=text data.source.paths=[/gone/*.txt]", r"data.source.paths=/gone/\*.txt: no such file"),
        ("data.source.domains=[speach]", "data.source.domains=.*: choose from speech"),
        ("router", "cannot read the command line"),
        ("=3", "=3: the key is missing"),
        ("data.seq_len=${data.seq_len}", "data.seq_len"),
        ("experiment=noise_lb_sed", "unknown option of experiment 'noise_lb_sed'; nearest: noise_lb_seed"),
        ("--config-name other", "--config-name is not supported"),
        ("optimizer.muon_lr=-0.1", r"optimizer.muon_lr=-0.1: must be a finite number > 0"),
        ("logger.project='SPACE'", "^logger.project=.*: must be a name of W&B: 1 to 128 .*, not only spaces"),
        ("logger.mode=of", "logger.mode=of: must be one of"),
        ("router=hash noise=5", "^noise=5.0: router=hash ignores noise, because a table .* decides; leave it out$"),
        ("router=soft_moe capacity=1", "^capacity=1.0: router=soft_moe ignores capacity, because tokens choose no"),
        (
            "router=switch output_orthogonality=1",
            "^output_orthogonality=1.0: router=switch .*, because each token has one expert; ",
        ),
        ("expert_parallel=true erc=1", "^erc=1.0: must be 0 where each rank has a part of each weight"),
        ("router=hash erc=1", "^erc=1.0: router=hash ignores erc, because its logits are no"),
        ("router=cosine simbal=1", "^simbal=1.0: router=cosine ignores simbal, because its logits are no products"),
        ("drop=score", "^drop=score: nothing is dropped without a capacity limit; leave it out$"),
        ("variant=dense z=1", "^z=1.0: no layer of this model is a Mixture of Experts; leave it out$"),
        (
            "router.k=1 router.gate=softmax_all",
            "^router.gate=softmax_all: router=topk ignores router.gate with",
        ),
        ("-m router.k=1 router.gate=softmax_all,renorm", "^router.gate=softmax_all: router=topk ignores router.gate"),
        ("router=switch router.gate=renorm", "^router.gate=renorm: router=switch ignores router.gate with"),
        (
            "router=sigmoid_bias router.k=1 router.normalize=false",
            "^router.normalize=False: router=sigmoid_bias ignores",
        ),
        ("router=softk router.after_drops=false", "^router.after_drops=False: nothing is dropped without a capacity"),
        (
            "-m router=softk router.after_drops=true,false",
            "^router.after_drops=False: nothing is dropped without a cap",
        ),
        (
            "router=gumbel model.num_experts=1 router.k=1 noise=1",
            "^noise=1.0: router=gumbel ignores noise, because there is one expert; leave it out$",
        ),
        ("router=sinkhorn router.k=8 router.epsilon=2", "^router.epsilon=2: router=sinkhorn ignores router.epsilon"),
        (
            "variant=spectra_no_quota router.expert_choice_capacity_factor=2",
            "^router.expert_choice_capacity_factor=2: ",
        ),
        (
            "optimizer=adamw optimizer.momentum=0.9",
            "^optimizer.momentum=0.9: optimizer=adamw has no Muon, .*; leave it",
        ),
        ("optimizer=adamw optimizer.expert_step=gradient", "^optimizer.expert_step=gradient: optimizer=adamw has no"),
        (
            "optimizer.experts_lr=0.1",
            "^optimizer.experts_lr=0.1: Muon trains these matrices, with optimizer.muon",
        ),
        ("-m optimizer=adamw router=hash optimizer.router_lr=0.1,0.2", "=0.1: router=hash has no weights to train;"),
        ("router=hash optimizer.router_lr=0.1", "^optimizer.router_lr=0.1: router=hash has no weights to train;"),
        (
            "model.num_experts=1 router.k=1 optimizer.expert_step=gradient",
            "^optimizer.expert_step=.*: there is one expert",
        ),
        (
            "variant=dense optimizer.expert_step=gradient",
            "^optimizer.expert_step=gradient: no layer of this model is a",
        ),
        ("model.upcycle_reset=0.5", "^model.upcycle_reset=0.5: must be 0 without model.dense$"),
        ("model.dense_digest=abc", "^model.dense_digest=abc: must be left out without model.dense$"),
        ("capacity=4", "^capacity=4.0: must be null, or below 4: from there on an expert has room for all tokens"),
        ("router=expert_threshold capacity=8", "^capacity=8.0: must be null, or below 8: "),
        ("router=random router.k=8 noise=0.5", "^noise=0.5: router=random ignores noise, because every token"),
        ("router=top_p router.k_max=1 router.p=0.9", "^router.p=0.9: router=top_p ignores router.p with its other"),
        ("router=top_p router.p=1 router.k_max=8 lb=1", "^lb=1.0: router=top_p ignores lb, because every token"),
        ("router.k=8 lb=1", "^lb=1.0: router=topk ignores lb, because every token goes to all experts; leave it"),
        ("router.k=8 noise=0.1 load=1", "^load=1.0: router=topk ignores load, because every token goes to all"),
        ("router=hash load=1 noise=0.1", "^load=1.0: router=hash ignores load, because it does not choose"),
        ("router=top_p router.p=1 router.k_max=9", "^router.k_max=9: must be between 1 and model.num_experts=8$"),
        ("model.num_experts=1 router.k=1 router_entropy=1", "^router_entropy=1.0: .*, because there is one"),
        ("-m experiment=noise_lb_seed router=hash", "^lb=.*: router=hash ignores lb, because a table"),
        ("-m router=hash,random z=1", "^z=1.0: router=hash ignores z, because a table"),
        ("-m router=hash lb=0,0.01", "^lb=0.01: router=hash ignores lb, because a table"),
        ("router=hash schedule=linear schedule.knob=noise", "^schedule.knob=noise: this router ignores noise"),
        ("hydra.run.dir=x", "^hydra.run.dir=x: write out=DIR, which sets the folder of the runs$"),
        (
            "hydra=null",
            "^hydra=null: of .*, hydra.launcher.KEY, .*, hydra/sweeper/sampler, hydra.searchpath can be set$",
        ),
        ("hydra.runtime.choices.experiment=foo", "of Hydra's settings only hydra/launcher"),
        ("-m hydra={mode:MULTIRUN}", "of Hydra's settings only hydra/launcher"),
        ("-m hydra.sweep.subdir=${hydra.job.num} seed=1,2", r"^hydra.sweep.subdir=\${hydra.job.num}: write out="),
        ('-m hydra.sweeper.params={seed:"1,2"}', "of Hydra's settings only hydra/launcher"),
        ("hydra/launcher=joblib hydra.launcher.n_job=2", "hydra.launcher.n_job=2: "),
        ("-m hydra/launcher=basic,joblib", "a command has one hydra/launcher"),
        ("-m router=topk,hash router.temp=1.5", "router=topk has no key temp; router=gumbel, router=temperature have"),
        ("-m router=topk,topq", "unknown option of router 'topq'; nearest: top"),
        ("-m router=topk,null", "unknown option of router 'null'"),
        ("-m router=glob(qq*)", r"router=glob\(qq\*\): this stands for no value"),
        ("-m seed=range(1,1)", r"seed=range\(1,1\): this stands for no value"),
        ("-m seed=interval(1,3)", r"seed=interval\(1,3\): an interval has no list of values"),
        (
            "-m seed=1,2 --cfg job",
            "^--multirun and --cfg cannot be used together: leave -m out, and give one value for each key$",
        ),
        ("seed=1,2 --cfg job", "seed=1,2: --cfg and --info show one run"),
        ("--cfg job foo=3", "unknown key 'foo'"),
        ("--cfg job router.kk=3", "unknown key of router=topk 'router.kk'; nearest: router.k"),
        ("--cfg job --resolve noise=${nothing}", r"^noise=\${nothing}: "),
        ("--info defaults router=topq", "unknown option of router 'topq'"),
        ("--resolve", "--resolve works only with --cfg"),
        ("--package x", "^--package works only with --cfg, such as --cfg job --package optimizer$"),
        ("--cfg job -p optimiser", "^unknown package 'optimiser'; nearest: optimizer$"),
        ("--cfg job -p hydra.run", "^unknown package 'hydra.run'"),
        ("out=???", "^out: required, for example 'out=...'$"),
        (r"out='a\${b}'", r"^out=a\${b}: must be a path without \${$"),
        (f"out={'x' * 300}", "^out=x+: File name too long$"),
        (f"data.cache={'x' * 300}", "^data.cache=x+: File name too long$"),
        (f"data=text data.source.paths=[{'x' * 300}]", "^data.source.paths=x+: File name too long$"),
        (f"data=text data.source.paths=[{'x' * 300}/*.txt]", "^data.source.paths=x+: File name too long$"),
        (f"model=upcycled model.dense={'x' * 300}", "^model.dense=x+: File name too long$"),
        (f"data.tokenizer={'x' * 300} data.vocab_size=null", "^data.tokenizer=x+: .*File name too long"),
        ("out=a\0b", r"^out='a\\x00b': must be a path$"),
        ("out=a\udcffb", r"^cannot read the command line: out=a\\udcffb: must be UTF-8$"),
        (
            "-m hydra/launcher=joblib hydra.launcher.n_jobs=0",
            "^hydra.launcher.n_jobs=0: must be a whole number > 0",
        ),
        ("-m hydra.sweeper.max_batch_size=0", "^hydra.sweeper.max_batch_size=0: must be a whole number > 0, or null$"),
        (
            "-m hydra.sweeper.max_batch_size=-1",
            "^hydra.sweeper.max_batch_size=-1: must be a whole number > 0, or",
        ),
        ("-m noise=range(0,1e9,1e-9)", "this one has 1,000,000,000,000,000,000$"),
        (
            "-m seed=range(0,2000) noise=range(0,1,0.1)",
            "^noise=.*: a sweep has at most 10,000 cells, .* has 20,000$",
        ),
        ("-m noise=range(0,1,0)", r"^noise=range\(0,1,0\): the step must not be 0$"),
        (
            "data=text data.source.paths=[~nobody_x/a.txt]",
            r"""put a text in quotes, like 'data.source.paths=\["~no""",
        ),
        ('data=text data.source.paths=["~nobody_x/a.txt"]', "^data.source.paths=~nobody_x/a.txt: there is no home dir"),
        ("--shell-completion x", "--shell-completion needs one word such as install=bash"),
        ("--shell-completion install=cmd", "--shell-completion needs one word such as install=bash"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--cfg jobs", "invalid choice: 'jobs'"),
        ("-m --run seed=1", "--run and --multirun cannot be used together"),
        (f"lb={'9' * 400}", "^lb=999.*: must be a number"),
        (f"lb={'9' * 5000}", "^cannot read the command line: lb=999"),
        ("-m noise=0,0.0,0.5", "are the same run: noise=0 and noise=0.0; leave one out"),
        ("-m noise=0.1,.1,1e-1", "^noise=0.1,.1,1e-1: two of these values are the same; leave one out$"),
        ("-m seed=1,01", "are the same run: seed=1 and seed=01"),
        ("-m router=temperature router.temp=1,1.0", "are the same run: router.temp=1 and router.temp=1.0; leave"),
        ("-m noise=0,0.0 seed=1", "^two cells of this sweep are the same run: noise=0 and noise=0.0; leave one out$"),
        ("-m variant=null,top1 router.k=1", "are the same run: router.k=1 and router.k=1,variant=top1"),
        (
            "data.tokenizer=x/lb=0.0,seed=1/model",
            """put a text in quotes, like 'data.tokenizer="x/lb=0.0,seed=1/model"'""",
        ),
        ("'", "cannot read the command line: ': write key=value"),
        (
            "-m noise=tag(a,0.1,0.2)",
            r"noise=tag\(a,0.1,0.2\): mismatch type argument .*float is incompatible with .*; a text needs quotes$",
        ),
        ("-m noise=extend_list(1)", r"noise=extend_list\(1\): Unknown function 'extend_list'; a text needs quotes$"),
    ],
)
def test_wrong_commands(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells([word.replace("SPACE", " ") for word in arguments.split()])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("router=topkk", "unknown option of router 'topkk'; nearest: topk"),
        ("noise=x", "noise=x: must be a number"),
        ("nois=1", "unknown key 'nois'; nearest: noise"),
        ("modl.dim=1", "unknown key 'modl.dim'; write model.dim"),
    ],
)
def test_plain_mistakes_are_refused_before_hydra_composes(
    word: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composing would double the time until the message."""
    monkeypatch.setattr("moe.launch.command_line.Start.of", lambda *_, **__: pytest.fail("composed"))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        read_cells([word])


def test_a_size_that_the_model_does_not_use_may_have_one_value() -> None:
    """It is no factor then, and the other cells of a sweep may be of models that use it."""
    for words in (
        "model.dense_ffn=64 seed=1,2",
        "variant=null,dense model.ffn=64",
        "experiment=spectra_ablation seed=1",
    ):
        assert len(read_cells(["-m", *words.split()]) or []) > 1


def test_cells_whose_schedules_differ_at_one_step_are_different_runs() -> None:
    words = "-m router=temperature schedule=step steps=10 schedule.first=0.5 schedule.second=0.5,0.6"
    assert len(read_cells(words.split()) or []) == 2


def test_a_wrong_command_prints_one_line_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    done = run_script(TRAIN, "-m", "noise=0.0,0.1", "router.k=2,9", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "train.py: router.k=9: must be between 1 and model.num_experts=8\n"
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_with_its_purpose() -> None:
    done = run_script(TRAIN, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())  # purposes are wrapped
    for group in GROUPS:
        for name, purpose in options(group).items():
            assert purpose, f"conf/{group}/{name}.yaml needs a first line '# its purpose'"
            assert f"{name} " in done.stdout
            assert purpose in words


def test_a_line_is_printed_before_the_seconds_in_which_pytorch_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is printed once, and the import then goes on as usual. Who only asks whether torch is there prints nothing."""
    finder = SayThatTorchLoads()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch")
    assert importlib.util.find_spec("torch") is not None
    assert finder.find_spec("json", None) is None
    assert capsys.readouterr().out == ""
    assert finder.find_spec("torch._utils", None) is None
    assert capsys.readouterr().out == "checking the settings and loading PyTorch\n"
    assert finder not in sys.meta_path


@pytest.mark.parametrize("words", ["--help", "--help noise", "lb=-1", "lbx=1", "router=topk router.kk=2"])
def test_help_and_refusals_import_no_library_that_they_do_not_need(words: str) -> None:
    """Each of these libraries takes a tenth of a second or more."""
    unneeded = {"torch", "numpy", "jaxtyping", "pandas", "scipy", "transformers", "huggingface_hub", "wandb"}
    code = f"import sys; from moe.launch.train import main; print('\\n', main(), *{unneeded} & {{*sys.modules}})"
    command = [sys.executable, "-c", code, *words.split()]
    answer = subprocess.run(command, cwd=CONF.parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert answer.splitlines()[-1].split() == ["0" if "--help" in words else "2"]


def test_a_refused_setting_of_a_router_imports_pytorch_without_its_compiler() -> None:
    unneeded = {"torch._dynamo", "torch._inductor", "sympy", "scipy", "transformers", "wandb"}
    code = f"import sys; from moe.launch.train import main; print(main(), *{unneeded | {'torch'}} & {{*sys.modules}})"
    command = [sys.executable, "-c", code, "router.k=9"]
    answer = subprocess.run(command, cwd=CONF.parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert answer.splitlines()[-1] == "2 torch"


def test_the_users_single_command() -> None:
    [cell] = read_cells(["router=temperature", "router.temp=1.5"]) or []
    assert cell.config.temperature == 1.5
    assert cell.choices["router"] == "temperature"
    assert cell.folder == Path("outputs/default/router.temp=1.5,router=temperature")


def test_the_users_sweep_is_the_eighteen_cells_in_order() -> None:
    cells = read_cells(["-m", "noise=0.0,0.1,0.5", "lb=0.0,0.01", "seed=42,43,44"]) or []
    grid = [(c.config.noise, c.config.lb, c.config.seed) for c in cells]
    assert grid == [(n, lb, s) for n in (0.0, 0.1, 0.5) for lb in (0.0, 0.01) for s in (42, 43, 44)]
    assert cells[0].folder == Path("multirun/default/lb=0.0,noise=0.0,seed=42")


def test_a_sweep_starts_seed_by_seed_and_every_second_seed_in_reverse_order() -> None:
    """The folders, the list of cells and the words of each cell stay as the user wrote them."""
    command = command_line.read_command(["-m", "noise=0.0,0.1,0.5", "seed=42,43,44"])
    [started] = command.batches(None, None)
    assert [[line for line in cell if not line.startswith("hydra.")] for cell in started] == [
        [f"noise={noise}", f"seed={seed}"]
        for seed, noises in ((42, (0.0, 0.1, 0.5)), (43, (0.5, 0.1, 0.0)), (44, (0.0, 0.1, 0.5)))
        for noise in noises
    ]
    assert command.batches(None, 4) == [started[:4], started[4:8], started[8:]]


def test_cells_of_a_sweep_that_are_the_same_run_become_one_cell(tmp_path: Path) -> None:
    """A value that applies to some routers of a sweep only is no level of the others."""
    words = ["-m", "router=topk,hash", "noise=0.0,0.5", f"out={tmp_path}"]
    cells = read_cells(words) or []
    assert [cell.folder.name for cell in cells] == ["noise=0.0,router=topk", "noise=0.5,router=topk", "router=hash"]
    assert "noise" not in cells[2].identity()
    gates = read_cells(["-m", "router.k=1,2", "router.gate=renorm,softmax_all", f"out={tmp_path}"]) or []
    assert [cell.folder.name for cell in gates] == [
        "router.k=1",
        "router.gate=renorm,router.k=2",
        "router.gate=softmax_all,router.k=2",
    ]
    dense = read_cells(["-m", "model=tiny,dense", "router.k=1,2", f"out={tmp_path}"]) or []
    assert [cell.folder.name for cell in dense] == ["model=tiny,router.k=1", "model=tiny,router.k=2", "model=dense"]
    limited = read_cells(["-m", "capacity=1.0,null", "drop=position,score", f"out={tmp_path}"]) or []
    assert [cell.folder.name for cell in limited] == [
        "capacity=1.0,drop=position",
        "capacity=1.0,drop=score",
        "capacity=null",
    ]


def test_a_key_that_some_swept_options_lack_does_not_apply_to_them(tmp_path: Path) -> None:
    """The options that have the key get each of its values, and the others are trained once."""
    words = ["-m", "router=topk,temperature", "router.temp=1,2", f"out={tmp_path}"]
    cells = read_cells(words) or []
    assert [cell.folder.name for cell in cells] == [
        "router=topk",
        "router.temp=1,router=temperature",
        "router.temp=2,router=temperature",
    ]
    assert "router.temp" not in cells[0].identity()
    assert [cell.config.temperature for cell in cells] == [1.0, 1.0, 2.0]
    schedules = ["-m", "router=temperature", "schedule=constant,linear", "schedule.start=2,3", f"out={tmp_path}"]
    assert [cell.config.schedule.get("start") for cell in read_cells(schedules) or []] == [None, 2, 3]
    momenta = ["-m", "optimizer=muon,adamw", "optimizer.momentum=0.9,0.95", f"out={tmp_path}"]
    assert [cell.folder.name for cell in read_cells(momenta) or []] == [
        "optimizer.momentum=0.9,optimizer=muon",
        "optimizer.momentum=0.95,optimizer=muon",
        "optimizer=adamw",
    ]


@pytest.mark.parametrize(
    ("words", "names", "settings"),
    [
        (
            "optimizer=adamw,muon optimizer.expert_step=equal,gradient",
            ["optimizer=adamw", "optimizer.expert_step=equal,optimizer=muon", "optimizer.expert_step=gradient,"],
            [("equal", None), ("equal", None), ("gradient", None)],
        ),
        (
            "optimizer=muon optimizer.router_lr=null,0.1",
            ["optimizer=muon", "optimizer.router_lr=0.1,optimizer=muon"],
            [("equal", None), ("equal", 0.1)],
        ),
        (
            "optimizer=adamw router=hash,topk optimizer.router_lr=0.1,0.2",
            ["optimizer=adamw,router=hash", "optimizer.router_lr=0.1,", "optimizer.router_lr=0.2,"],
            [("equal", None), ("equal", 0.1), ("equal", 0.2)],
        ),
        (
            "variant=dense,null optimizer=adamw optimizer.router_lr=0.1,0.2",
            ["optimizer=adamw,variant=dense", "optimizer.router_lr=0.1,", "optimizer.router_lr=0.2,"],
            [("equal", None), ("equal", 0.1), ("equal", 0.2)],
        ),
    ],
)
def test_a_key_of_the_optimizer_does_not_apply_where_nothing_uses_it(
    words: str, names: list[str], settings: list[tuple[str, float | None]]
) -> None:
    """Its cells are trained once and have its default."""
    cells = read_cells(["-m", *words.split()]) or []
    assert [cell.folder.name[: len(name)] for cell, name in zip(cells, names, strict=True)] == names
    assert [(c.config.optimizer.expert_step, c.config.optimizer.router_lr) for c in cells] == settings
    key = re.findall(r"optimizer\.(\w+)", words)[0]
    assert [f"optimizer.{key}" in cell.identity() for cell in cells] == [f"optimizer.{key}=" in n for n in names]


@pytest.mark.parametrize(
    ("words", "names", "told"),
    [
        ("router=softk,topk", ["router=topk"], ["router=softk is the same run as router=topk here"]),
        (
            "router=topk,softk capacity=null,1.25",
            ["capacity=null,router=topk", "capacity=1.25,router=topk", "capacity=1.25,router=softk"],
            ["router=softk is the same run as router=topk with capacity=null, and is trained once, as router=topk"],
        ),
        (
            "router=spectra router.expert_choice_routing=false router.expert_choice_capacity_factor=1.25,5",
            ["router.expert_choice_routing=False,router=spectra"],
            ["router.expert_choice_capacity_factor=5 is the same run as router.expert_choice_capacity_factor=1.25"],
        ),
        (
            "router=spectra router.expert_choice_capacity_factor=1.25,4,5",
            [f"router.expert_choice_capacity_factor={factor},router=spectra" for factor in ("1.25", "4")],
            ["router.expert_choice_capacity_factor=5 is the same run as router.expert_choice_capacity_factor=4"],
        ),
        (
            "router=group_limited router.groups=2,4,8 router.top_groups=2",
            [f"router.groups={groups},router.top_groups=2,router=group_limited" for groups in (2, 4)],
            ["router.groups=8 is the same run as router.groups=2"],
        ),
    ],
)
def test_cells_that_are_the_same_run_under_several_names_are_trained_once(
    words: str, names: list[str], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The cell stays to which more keys apply. Its other name is told once, and not for each seed."""
    cells = read_cells(["-m", *words.split(), "seed=1,2"]) or []
    assert [cell.folder.name for cell in cells] == [f"{name},seed={seed}" for name in names for seed in (1, 2)]
    assert cells[0].grid is not None
    assert cells[0].grid.cells == [cell.folder.name for cell in cells]
    assert [line.partition(" here")[0] for line in caplog.messages] == [line.partition(" here")[0] for line in told]


def test_a_value_given_in_vain_is_refused_after_the_runs_are_finished_too(tmp_path: Path) -> None:
    """The same command has the same answer before and after. A finished run says by itself which keys it ignores."""
    words = ["-m", "router=hash", "seed=1,2", f"out={tmp_path}"]
    others = ["-m", "model=tiny,dense", "router.k=1,2", "router.gate=renorm,softmax_all", f"out={tmp_path}"]
    first, of_others = read_cells(words) or [], read_cells(others) or []
    for cell in (*first, *of_others):
        cell.folder.mkdir(parents=True)
        write_run_record(cell, "finished", parse(RunFacts, FACTS))
    assert [cell._replace(overrides=()) for cell in read_cells(others) or []] == [
        cell._replace(overrides=()) for cell in of_others
    ]
    for vain in ("noise=0.5", "lb=7", "drop=score"):
        with pytest.raises(
            ConfigError,
            match=r"(router=hash ignores [a-z]+, because a table .* decides; leave it out|without a capacity limit.*)$",
        ):
            read_cells([*words, vain])
    again = read_cells([*words, "noise=0"]) or []
    assert [cell.folder for cell in again] == [cell.folder for cell in first]
    assert [cell.identity() for cell in again] == [cell.identity() for cell in first]


def test_an_experiment_sweeps_by_itself_and_the_command_line_narrows_it() -> None:
    assert len(read_cells(["experiment=noise_lb_seed"]) or []) == 18
    narrowed = read_cells(["experiment=noise_lb_seed", "seed=42", "noise=0.0,0.5"]) or []
    assert len(narrowed) == 4
    assert {c.folder.parent for c in narrowed} == {Path("multirun/noise_lb_seed")}


# `finetuning` needs a checkpoint: tests/launch/test_imported_models.py
@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {"finetuning"}))
def test_the_cells_of_every_experiment_differ_and_its_pilot_can_be_trained(
    experiment: str, finished_ablation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that chose a value are in the folder of the study, and not in that of the pilot.

    Of the pilot's command, one cell is composed, in its middle. Single keys of the command may not apply to it.
    """
    fewer = {"router_league": ["router=topk,switch", "tune=null"], "scaling": ["model.num_experts=8"]}.get(
        experiment, []
    )
    words = [f"experiment={experiment}", "seed=7", f"out={finished_ablation}", *fewer]
    cells = read_cells(words) or []
    identities = [str(sorted(cell.config.identity().items(), key=str)) for cell in cells]
    assert len(set(identities)) == len(identities)
    if not cells[0].config.claims:
        return  # a plan is about claims
    one = "moe.launch.cells._with_keys_that_exist"
    monkeypatch.setattr(one, lambda grid: _with_keys_that_exist([grid[len(grid) // 2]]))
    monkeypatch.setattr("moe.launch.cells._refuse_given_in_vain", lambda *_: None)
    command = pilot_command(Request(words, Effect("1sd"), {}, 0.8, 32), cells)
    [pilot] = read_cells(shlex.split(command)[2:]) or []
    assert pilot.folder.parents[1] == Path("pilot")
    assert pilot.config.claims == cells[0].config.claims
    assert pilot.config.seed not in (7, *cells[0].config.tune_seeds)


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in ("router", "experiment", "data", "variant")])
def test_every_option_composes(group: str) -> None:
    for name in options(group):
        if name in (
            "upcycled",
            "imported",
            "tensorboard",
        ):  # need a checkpoint or a package, and have tests of their own
            continue
        extra = ["router=temperature"] if group == "schedule" else []
        assert read_cells([f"{group}={name}", *extra])


def test_routers_that_balance_in_another_way_have_no_balance_loss_by_default() -> None:
    """Their docstrings say so, and a command or an experiment that sets lb is obeyed."""
    specs = {name: router_spec(name) for name in options("router")}
    texts = {
        name: inspect.getdoc(locate(spec["_target_"], "router", trusted=True)) or "" for name, spec in specs.items()
    }
    said = {name for name, text in texts.items() if "`lb` is 0 by default" in " ".join(text.split())}
    assert {name for name in specs if default_of("lb", {"router": name}) == 0} == said >= {"sinkhorn", "sigmoid_bias"}
    by_router = [cell.config.lb for cell in read_cells(["-m", "router=topk,sinkhorn"]) or []]
    given = [cell.config.lb for cell in read_cells(["-m", "router=topk,sinkhorn", "lb=0.02"]) or []]
    assert (by_router, given) == ([0.01, 0.0], [0.02, 0.02])


def test_every_variant_composes_and_wins_over_an_experiment() -> None:
    for name in options("variant"):
        chosen = yaml.safe_load((CONF / "variant" / f"{name}.yaml").read_text())
        cells = read_cells(["experiment=noise_floor", f"variant={name}", "seed=42"]) or []
        assert all(cell.choices["variant"] == name for cell in cells)
        router = next((d["override /router"] for d in chosen.get("defaults", []) if "override /router" in d), None)
        assert router is None or all(cell.choices["router"] == router for cell in cells)


def test_the_best_temperature_is_that_of_the_lowest_mean_over_seeds(finished_ablation: Path) -> None:
    """The best temperature is 1.5 with the lowest mean, not 2.0 with the lowest single run."""
    cells = read_cells(["experiment=temperature_best_long", f"out={finished_ablation}"]) or []
    assert {cell.config.temperature for cell in cells} == {1.0, 1.5}
    assert {cell.config.steps for cell in cells} == {600}
    assert {str(claim.levels) for cell in cells for claim in cell.config.claims} == {"[1.5]"}


def test_seeds_that_chose_the_temperature_do_not_judge_it(finished_ablation: Path) -> None:
    """Whoever added seeds to the ablation gets the next free ones, and a plan proposes none that chose."""
    results = finished_ablation / "temperature_ablation" / "results.csv"
    results.write_text(f"{results.read_text()}\nx,e,finished,46,1.5,4.0\nx,f,finished,50,1.5,4.0\n")
    command = ["experiment=temperature_best_long", f"out={finished_ablation}"]
    refusal = r"^seed=46: must be seeds that chose no value of .*, as 42, 43, 46, 50 did; .* are 51, 52, 53$"
    with pytest.raises(ConfigError, match=refusal):
        read_cells(command)
    with pytest.raises(ConfigError, match=r"^seed=42, 43: must be seeds .* free ones are 51, 52$"):
        read_cells([*command, "seed=042,43"])
    for again in ("init_seed=42", "data_seed=42,43"):
        with pytest.raises(
            ConfigError, match=rf"^{again}: must be null, because seeds chose a value of this experiment"
        ):
            read_cells([*command, "seed=45", again])
    for hidden in ("tune=null", "tune_seeds=[]"):
        with pytest.raises(ConfigError, match=r"^seed=42: must be seeds that chose no value"):
            read_cells([*command, "seed=42", hidden])
    cells = read_cells([*command, "seed=45,47,49"]) or []
    config = cells[0].config
    assert config.tune_seeds == [42, 43, 46, 50]
    assert free_seeds([45, 47, 49], {*config.tune_seeds}, 5) == [45, 47, 49, 51, 52]
    request = Request(command, Effect("1sd"), {}, 0.8, 32)
    assert " seed=1,2,3 " in pilot_command(request, cells)
    results.write_text(results.read_text().replace(",50,", ",fifty,"))
    with pytest.raises(ConfigError, match="fifty"):
        read_cells(command)
    parts = "experiment,status,seed,init_seed,data_seed,val/loss\na,finished,3,none,7,4.0\na,finished,3,5,,4.0"
    results.write_text(parts)
    assert seeds_in(str(results)) == [3, 5, 7]


def test_a_best_temperature_of_1_has_nothing_to_be_compared_with(finished_ablation: Path) -> None:
    results = finished_ablation / "temperature_ablation" / "results.csv"
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["router.temp"] = {"1.5": "1.0", "1.0": "1.5"}.get(row["router.temp"], row["router.temp"])
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ConfigError, match=r"router\.temp=1\.0 has the lowest val/loss in .*no other one is better"):
        read_cells(["experiment=temperature_best_long", f"out={finished_ablation}"])


def documented_pairs() -> set[tuple[str, str]]:
    """Return each experiment with every variant that the docs, or its own study's name, combine with it."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *CONF.rglob("*.yaml"))]
    named = {pair for text in texts for pair in re.findall(r"experiment=(\w+)[^`\n]* variant=(\w+)", text)}
    recipes = [name.removesuffix("_study") for name in options("variant") if name.endswith("_study")]
    return named | {(e, f"{r}_study") for r in recipes for e in options("experiment") if e.startswith(r)}


@pytest.mark.parametrize(("experiment", "variant"), sorted(documented_pairs()))
def test_an_experiments_own_keys_survive_the_variants_documented_with_it(
    experiment: str, variant: str, finished_ablation: Path
) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    others = ("defaults", "hydra", "claims", "question")
    own = {key: value for key, value in yaml.safe_load(text).items() if key not in others}
    [cell, *_] = read_cells([f"experiment={experiment}", f"variant={variant}", f"out={finished_ablation}"]) or []
    settings = cell.config.identity()
    kept = {key: settings[key] for key in flatten(own) if not is_free(key)}
    assert kept == {key: value for key, value in flatten(own).items() if key in kept}


def test_the_best_temperature_is_trained_for_twice_the_steps_of_the_recipe(finished_ablation: Path) -> None:
    command = ["experiment=temperature_best_long", "seed=1", "router.temp=1.5", f"out={finished_ablation}"]
    steps = {
        words: [cell.config.steps for cell in read_cells([*command, *words]) or []]
        for words in ((), ("variant=temperature_study",), ("variant=temperature_study", "steps=7"))
    }
    assert list(steps.values()) == [[600], [250], [7]]


def test_a_value_that_replaces_one_of_the_experiment_is_named(
    finished_ablation: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEARCH_PATH, "")  # --config-dir changes it
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["experiment=temperature_best_long", f"out={finished_ablation}"]
    read_cells([*command, "steps=7", "seed=1"])
    assert "steps=7 replaces the experiment's steps=600" in caplog.messages
    caplog.clear()
    read_cells([*command, "steps=600", "seed=1,2"])
    assert not [line for line in caplog.messages if "replaces" in line]
    demo = ["experiment=quick_demo", "seed=1", "router.temp=1.0,2.0"]
    (mine := finished_ablation / "variant" / "mine.yaml").parent.mkdir()
    mine.write_text("# @package _global_\n# Arm: mine\nnoise: 0.2\n")
    arm = ["--config-dir", str(finished_ablation), "variant=mine"]
    for words, now in ((["noise=0.5"], "0.5"), (arm, "0.2"), (["noise=0.1"], None)):
        [cell, *_] = read_cells([*demo, *words]) or []
        assert cell.grid is not None
        assert cell.grid.replaced == ({} if now is None else {"noise": "0.1"})
        assert (f"noise={now} replaces the experiment's noise=0.1" in caplog.messages) is (now is not None)
        caplog.clear()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.0,3.9", "2.0,nan", r"where the val/loss of c is 'nan'"),
        ("2.0,3.9", "2.0,", r"where the val/loss of c is ''"),
        ("router.temp", "router.k", "has no column router.temp or no rows"),
        ("seed", "sead", "has no column seed or no rows"),
    ],
)
def test_results_from_which_no_temperature_can_be_chosen(
    finished_ablation: Path, old: str, new: str, message: str
) -> None:
    results = finished_ablation / "temperature_ablation" / "results.csv"
    results.write_text(results.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_cells(["experiment=temperature_best_long", f"out={finished_ablation}"])


def test_a_shipped_table_tells_the_best_temperature_too(finished_ablation: Path, tmp_path: Path) -> None:
    results = finished_ablation / "temperature_ablation" / "results.csv"
    words = ["experiment=temperature_best_long", f"out={tmp_path}"]
    chosen = [cell.config.router["temp"] for cell in read_cells([*words, f"results={finished_ablation}"])]
    assert SHIPPED == RUNS
    (results.parent / SHIPPED).write_bytes(gzip.compress(results.read_bytes()))
    results.unlink()
    assert [cell.config.router["temp"] for cell in read_cells([*words, f"results={finished_ablation}"])] == chosen


def test_without_a_finished_ablation_there_is_no_best_temperature(tmp_path: Path, finished_ablation: Path) -> None:
    with pytest.raises(ConfigError, match=r"results\.csv, which does not exist: run that experiment first"):
        read_cells(["experiment=temperature_best_long", f"out={tmp_path / 'none'}"])
    results = finished_ablation / "temperature_ablation" / "results.csv"
    results.write_text(results.read_text().replace("c,finished", "c,failed"))
    with pytest.raises(ConfigError, match="where c is failed: finish it"):
        read_cells(["experiment=temperature_best_long", f"out={finished_ablation}"])


@pytest.mark.parametrize(
    "arguments",
    [
        "router=temperature router.temp=1.5 schedule=linear noise=0.25 seed=3",
        "experiment=noise_lb_seed variant=top1 lb=0.1 model.num_experts=16",
        "hydra/launcher=joblib hydra.launcher.n_jobs=2 out=/x optimizer.clip=3",
        "data.source.domains=[docs,cpp] logger.mode=offline claims=[]",
        "model.dim=32 model={dim:64} router.k=1 router={k:3}",
        "hydra.job.env_copy=[PATH] hydra.sweep.subdir=${hydra.job.env_set.PATH}",
    ],
)
def test_a_cell_is_what_hydra_composes_from_its_overrides(arguments: str) -> None:
    """Setting values in a copy of a composition gives what Hydra composes, including the names of folders."""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        expected = compose("config", overrides=arguments.split(), return_hydra_config=True)
    with composing():
        found = compose_config(arguments.split())
    assert (
        OmegaConf.to_container(found.hydra.job, resolve=True)["override_dirname"]
        == (OmegaConf.to_container(expected.hydra.job, resolve=True)["override_dirname"])
    )
    assert found.hydra.overrides.task == expected.hydra.overrides.task
    for key in ("run", "sweep", "launcher", "sweeper"):
        settings = [OmegaConf.to_container(each.hydra[key], resolve=True) for each in (found, expected)]
        assert settings[0] == settings[1]
    assert found.hydra.runtime.choices == expected.hydra.runtime.choices
    for each in (found, expected):
        OmegaConf.set_struct(each, False)
        each.pop("hydra")
    assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)


def test_the_text_of_an_interpolation_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values behind the same text are read each time."""
    values = OmegaConf.create({"seed": 1, "data": {"seed": "${seed}", "name": "seed-${seed}"}})
    assert (values.data.seed, values.data.name) == (1, "seed-1")
    monkeypatch.setattr("omegaconf.grammar_parser.OmegaConfGrammarLexer.mode", lambda *_: pytest.fail("parsed again"))
    values.seed = 2
    assert (values.data.seed, values.data.name) == (2, "seed-2")


def test_an_option_file_is_read_again_only_after_it_has_changed(tmp_path: Path) -> None:
    Plugins.instance()  # it registers the kinds of folders that Hydra reads
    path = ConfigSearchPathImpl()
    path.append("test", str(tmp_path))
    path.append("schema", "structured://")
    (tmp_path / "own.yaml").write_text("defaults: [other]\nk: 2\n")
    files = FilesReadOnce(path)
    first = files.load_config("own")
    first.config.k = first.defaults_list[0].path = "changed by who reads"
    again = files.load_config("own")
    assert (again.config, [each.path for each in again.defaults_list]) == ({"k": 2}, ["other"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(files.sources[0]), "load_config", lambda *_: pytest.fail("read again"))
        files.load_config("own")
    (tmp_path / "own.yaml").write_text("k: 16\n")
    assert files.load_config("own").config == {"k": 16}
    assert files.load_config("missing") is None


def test_run_names_are_safe_short_and_distinct() -> None:
    assert run_name("") == "base"
    assert run_name("lb=0.0,seed=42") == "lb=0.0,seed=42"
    odd = ["tag=a/b", "tag=a b", "tag=ä", "tag=../..", "x" * 300, "x" * 301]
    names = [run_name(text) for text in odd]
    assert len(set(names)) == len(names)
    pairs = [f"model.factor{number}={number}.12345" for number in range(20)]
    kept = run_name(",".join(pairs)).rpartition("-")[0].split(",")
    assert run_name(",".join([*pairs, "router=topk", "router.temp=1.5", "seed=3"])).startswith(
        "router=topk,router.temp=1.5,seed=3,"
    )
    assert kept == pairs[: len(kept)], "no value is cut"
    assert all("/" not in name and len(name.encode()) < 200 and name not in (".", "..") for name in names)


def test_an_unknown_mode_of_wandb_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(ConfigError, match=r"WANDB_MODE=bogus: must be one of online, offline, disabled$"):
        read_cells([])
    assert read_cells(["logger.mode=disabled"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "claims: [{text: a, metric: val/loss, factor: noise, levels: [0.5], then: [0.0], kind: higher}]",
            "unknown key of a claim in {}/experiment/mine.yaml 'then'; nearest: than",
        ),
        ("nois: 0.5", "unknown key in {}/experiment/mine.yaml 'nois'; nearest: noise"),
        ("model: {layer: 3}", "unknown key in {}/experiment/mine.yaml 'layer'; nearest: layers"),
        ("model: {layers: x}", "{}/experiment/mine.yaml: model.layers: must be a whole number"),
    ],
)
def test_a_mistake_in_a_file_of_an_experiment_names_file_and_key(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SEARCH_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n# Mine\n{content}\n")
    with pytest.raises(ConfigError) as raised:
        read_cells(["experiment=mine"])
    assert str(raised.value) == f"experiment=mine: {message.format(tmp_path)}"


def test_hydra_answers_its_own_flags() -> None:
    """The mark -- at the end of the flags is not passed on, because Hydra does not know it there."""
    for words, passed in (
        (["--cfg", "job", "--", "seed=1"], ["seed=1", "--cfg", "job"]),
        (["lb=0.0", "--cfg", "job", "seed=1"], ["lb=0.0", "seed=1", "--cfg", "job"]),
    ):
        assert command_line.read_command(words) == command_line.Command(None, passed)


def test_a_key_that_all_swept_options_have_can_be_set_for_all_of_them() -> None:
    cells = read_cells(["-m", "router=temperature,gumbel", "router.temp=1.5"]) or []
    assert [(cell.choices["router"], cell.config.temperature) for cell in cells] == [
        ("temperature", 1.5),
        ("gumbel", 1.5),
    ]
    cells = read_cells(["-m", "router=temperature", "schedule=linear,cosine", "schedule.start=5.0"]) or []
    assert [cell.config.schedule["start"] for cell in cells] == [5.0, 5.0]


def test_flags_may_stand_anywhere_and_a_glob_stands_for_options() -> None:
    assert len(read_cells(["lb=0.0", "-m", "seed=1,2"]) or []) == 2
    cells = read_cells(["experiment=noise_floor", "-m", "seed=1", "router=glob(so*)"]) or []
    assert {str(cell.choices["router"]) for cell in cells} == {name for name in options("router") if name[:2] == "so"}


def test_the_default_variant_can_be_chosen_and_swept() -> None:
    assert read_cells(["variant=null"]) == read_cells([])
    cells = read_cells(["-m", "variant=null,top1"]) or []
    assert [cell.choices["variant"] for cell in cells] == [None, "top1"]


def test_the_last_value_of_a_key_counts_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    [cell] = read_cells(["seed=1", "router=hash", "seed=2", "router=topk"]) or []
    assert (cell.config.seed, cell.choices["router"], cell.folder.name) == (2, "topk", "router=topk,seed=2")
    assert caplog.messages == ["seed is given twice: seed=2 counts", "router is given twice: router=topk counts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("steps=-1", "steps=-1: must be"),
        ("router.k=99", "router.k=99: must be between 1 and"),
        ("router=hash noise=1", "noise=1.0: router=hash ignores noise, because"),
        ("router=hash noise=1,2", "noise=1.0: router=hash ignores noise, because"),
        ("schedule=linear router=switch", "schedule.knob=temperature: this router has no temperature"),
    ],
)
def test_a_wrong_sweep_is_refused_at_its_first_cell(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[object] = []
    monkeypatch.setattr("moe.launch.cells.typed", lambda c, choices: composed.append(c) or typed(c, choices))
    with pytest.raises(ConfigError, match=message):
        read_cells(["-m", "seed=range(200)", *arguments.split()])
    assert len(composed) == 1


def test_the_home_directory_is_put_in_place_of_a_tilde_in_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run, and the results that an experiment reads, are found as the shell would find them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [cell.folder for cell in read_cells(["out=~/zz"]) or []] == [tmp_path / "zz" / "default" / "base"]
    with pytest.raises(ConfigError, match=f"comes from {tmp_path}/zz/temperature_ablation/results.csv"):
        read_cells(["experiment=temperature_best_long", "out=~/zz"])


@pytest.mark.parametrize("value", ["/tmp/ä", "x/lb=0.0/model", "a#b", "a~b!"])
def test_a_text_that_has_no_meaning_for_hydra_needs_no_quotes(value: str) -> None:
    [cell] = read_cells([f"out={value}"]) or []
    assert (cell.config.out, cell.folder) == (value, Path(value, "default", "base"))


def test_a_folder_of_the_same_run_is_found_under_any_spelling(tmp_path: Path) -> None:
    """Numbers may be written in other ways, and a default may be spelled out. Other choices are other runs."""
    [first] = read_cells([f"out={tmp_path}", "noise=0.1"]) or []
    first.folder.mkdir(parents=True)
    write_run_record(first, "interrupted")
    for same in (["noise=1e-1"], ["noise=.1"], ["noise=0.1", "lb=0.01"], ["noise=0.1", "seed=42", "router=topk"]):
        [cell] = read_cells([f"out={tmp_path}", *same]) or []
        assert cell.folder == first.folder
        assert f'hydra.run.dir="{first.folder}"' in cell.overrides
        [cell] = read_cells([f"out={tmp_path}", *same, "-m"]) or []
        assert cell.folder == first.folder
    for other in (["noise=0.2"], ["noise=0.1", "seed=1"], ["noise=0.1", "variant=top2", "router.k=2"]):
        [cell] = read_cells([f"out={tmp_path}", *other]) or []
        assert cell.folder != first.folder


@pytest.mark.parametrize(("router", "applies"), [("topk", True), ("hash", False)])
def test_a_run_from_before_a_key_existed_had_its_default(router: str, applies: bool, tmp_path: Path) -> None:
    """A key that the record does not know is no key that the run ignored."""
    words = [f"out={tmp_path}", f"router={router}"]
    [cell] = read_cells(words) or []
    record = recorded(cell)
    for key in ("lb_first", "optimizer.expert_step", "model.first_k_dense_replace"):
        group, _, name = key.rpartition(".")
        del (record["config"][group] if group else record["config"])[name]
        record["identity"].pop(key, None)
    (cell.folder / "run.json").write_text(json.dumps(record))
    [again] = read_cells(words) or []
    assert finished(again)
    assert again.identity() == cell.identity()
    assert ("lb_first" in again.identity()) is applies
    [spelled] = read_cells([*words, "seed=42"]) or []
    assert spelled.folder == cell.folder
    if applies:
        [other] = read_cells([*words, "lb_first=0.5"]) or []
        assert other.folder != cell.folder
        assert difference(other._replace(folder=cell.folder)) == ["lb_first is 0.0 in the folder, 0.5 in this command"]


@pytest.mark.parametrize(
    ("words", "key", "default", "other"),
    [
        (["router=topk", "router.gate=renorm"], "router.gate", "renorm", "uniform"),
        (["adapter=perft_r"], "adapter.activation", "identity", "silu"),
        (["data=text", f"data.source.paths=[{ROOT}/README.md]"], "data.source.drop_duplicates", "True", "False"),
    ],
)
def test_a_run_from_before_a_class_had_a_key_had_the_default_of_the_class(
    words: list[str], key: str, default: str, other: str, tmp_path: Path
) -> None:
    words = [f"out={tmp_path}", *words]
    [cell] = read_cells(words) or []
    record = recorded(cell)
    *nodes, name = key.split(".")
    place = record["config"]
    for node in nodes:
        place = place[node]
    del place[name], record["identity"][key]
    (cell.folder / "run.json").write_text(json.dumps(record))
    [spelled] = read_cells([*words, f"{key}={default}"]) or []
    assert spelled.folder == cell.folder
    assert finished(spelled)
    [changed] = read_cells([*words, f"{key}={other}"]) or []
    assert changed.folder != cell.folder
    [text] = difference(changed._replace(folder=cell.folder))
    assert text == f"{key} is {default} in the folder, {other} in this command"


@pytest.mark.parametrize(
    ("words", "ignored", "counts"),
    [
        (["router=topk", "router.k=1"], ["router.gate=softmax_all"], ["router.gate=uniform"]),
        (["optimizer=muon"], ["noise=0.0"], ["optimizer.router_lr=0.01"]),
    ],
)
def test_a_key_that_a_finished_run_ignored_counts_where_the_command_does_not_ignore_it(
    words: list[str], ignored: list[str], counts: list[str], tmp_path: Path
) -> None:
    """Whether a run ignores a key can depend on the value of that key: two gates of one expert are equal, not three."""
    words = [f"out={tmp_path}", *words]
    [cell] = read_cells(words) or []
    assert counts[0].partition("=")[0] in cell.ignored
    recorded(cell)
    with composing():
        [again], _ = expand([*map(parse_override, [*words, *ignored])], multirun=False, in_vain=True)
    assert again.folder == cell.folder
    assert finished(again)
    assert again.ignored == cell.ignored
    [other] = read_cells([*words, *counts]) or []
    assert other.folder != cell.folder
    [text] = difference(other._replace(folder=cell.folder))
    assert text.startswith(counts[0].partition("=")[0])


def recorded(cell: Cell) -> dict[str, Any]:
    """Write the run record of a finished run of a cell, and return its content."""
    cell.folder.mkdir(parents=True)
    write_run_record(cell, "finished", parse(RunFacts, FACTS))
    content: dict[str, Any] = json.loads((cell.folder / "run.json").read_text())
    return content


def test_the_claim_given_as_an_example_works() -> None:
    [cell, _] = read_cells(["-m", "noise=0.0,0.5", CLAIM]) or []
    assert cell.config.claims[0].levels == [0.5]


def test_every_hint_names_a_key_that_exists() -> None:
    """What a hint says begins with a key of the configuration, or with an environment variable; keys get no hint."""
    keys = {*GROUPS, *Config.__dataclass_fields__, "router.k", "router.temp", "data.source.paths"}
    [cell] = read_cells([]) or []
    keys |= set(flatten(asdict(cell.config)))
    for word, meant in HINTS.items():
        first = re.split("[ ,=]", meant)[0]
        assert first in keys or first == "CUDA_VISIBLE_DEVICES", word
        assert word not in {key.replace("_", "") for key in keys}, word


def test_help_ends_without_a_message_if_its_reader_has_gone() -> None:
    """This is what happens in `python train.py --help | head -3`."""
    with subprocess.Popen([sys.executable, TRAIN, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
