"""One scheduler in this process: `one_scheduler.py JOB OUT`, for `tests.engine.inproc.bed`.

Requests arrive four at a time, in every third pass. The process ends when all have ended and the
scheduler has found itself idle, which runs SGLang's leak checks. With pipeline stages, this is the
one of `job["stage"]`, the requests go to the first, and all of them end like that.
"""

import importlib
import json
import os
import signal
import sys
import time
from array import array

from sglang.srt.plugins import load_plugins

from pascal_sglang import older_sglang

AT_A_TIME, EVERY = 4, 3


def build(flags, stage):
    """A scheduler from SGLang's flags, and its port arguments."""
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args
    from sglang.srt.managers import scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(flags)
    check_lora_server_args(server_args)
    port_args = PortArgs.init_new(server_args)
    # It has no parent that serves.
    scheduler.kill_itself_when_parent_died = lambda: None
    publish(
        server_args,
        role="scheduler",
        ranks=SpawnRanks(world_rank=stage, dp_rank=None, gpu_id=stage),
    )
    scheduler.configure_scheduler_process(server_args, stage)
    # Looked up late: the plugin puts ours in its place.
    return scheduler.Scheduler(server_args, port_args), port_args


def message(scheduler, index, asked):
    """What the tokenizer process would send."""
    from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
    from sglang.srt.sampling.sampling_params import SamplingParams

    defaults = {"max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(**{**defaults, **asked["params"]})
    params.normalize(scheduler.tokenizer)
    params.verify(scheduler.model_config.vocab_size)
    fields = {
        "rid": f"r{index}",
        "input_text": "",
        "input_ids": array("q", asked["ids"]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": params,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
        **asked["options"],
    }
    if fields.get("session_params") is not None:
        fields["session_params"] = SessionParams(**fields["session_params"])
    request = TokenizedGenerateReqInput(**fields)
    request.time_stats = APIServerReqTimeStats()
    return request


class Feeder:
    """Takes the place of the sockets: hands requests in, and ends the loop."""

    def __init__(self, scheduler, port_args, job, out):
        self.scheduler, self.out = scheduler, out
        self.left = [message(scheduler, i, asked) for i, asked in enumerate(job["requests"])]
        self.wanted = len(self.left)
        self.reqs, self.passes = {}, 0
        self.deadline = time.monotonic() + job["limit_s"]
        self.each_pass = _named(job["each_pass"])
        create = scheduler._create_generation_req

        def remember(recv_req, *args, **kwargs):
            req = create(recv_req, *args, **kwargs)
            self.reqs[req.rid] = req
            return req

        scheduler._create_generation_req = remember
        take_in = scheduler.ingest_requests
        scheduler.ingest_requests = self.ingest
        self.hand_in, self.go_on = scheduler.handle_generate_request, lambda: None
        if scheduler.pp_group.world_size > 1:
            self.go_on = take_in
            self.hand_in = _sender(port_args) if scheduler.pp_group.is_first_rank else None

    def ingest(self):
        self.passes += 1
        if self.passes % EVERY == 1 and self.hand_in is not None:
            now, self.left = self.left[:AT_A_TIME], self.left[AT_A_TIME:]
            for request in now:
                self.hand_in(request)
        if self.each_pass is not None:
            self.each_pass(self.scheduler, self.reqs, self.passes)
        if time.monotonic() > self.deadline:
            late = [rid for rid, req in self.reqs.items() if not req.finished()]
            raise TimeoutError(f"{len(self.left)} requests not begun, not ended: {late}")
        ended = len(self.reqs) == self.wanted and all(r.finished() for r in self.reqs.values())
        if ended and self.scheduler.is_fully_idle():
            self.scheduler.on_idle()
            written = f"{self.out}.part"
            with open(written, "w") as file:
                json.dump(self.outcome(), file, default=str)
            os.rename(written, self.out)
            self.scheduler.gracefully_exit = True
            if self.scheduler.pp_group.world_size > 1:
                sys.stdout.flush()
                signal.pause()  # The others may still read what this one has sent.
        return self.go_on()

    def outcome(self):
        scheduler = self.scheduler
        reqs = [self.reqs[f"r{i}"] for i in range(self.wanted)]
        allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        status = getattr(scheduler, "pascal_status", dict)()
        # Of a pool beside one of sliding windows, which the checks on idle count.
        whole = getattr(allocator, "full_attn_allocator", allocator)
        return {
            "outputs": [list(req.output_ids_through_stop) for req in reqs],
            "finish": [req.finished_reason.to_json() for req in reqs],
            "logprobs": [_logprobs(req) for req in reqs],
            "hidden_states": [[_rows(x) for x in req.hidden_states] for req in reqs],
            "status": status,
            "kinds": {
                "scheduler": type(scheduler).__name__,
                "allocator": type(allocator).__name__,
                "pool": type(allocator.get_kvcache()).__name__,
                "tree": type(tree).__name__,
                "overlap": bool(scheduler.enable_overlap),
                "attention": type(scheduler.tp_worker.model_runner.attn_backend).__name__,
            },
            "cached": [int(req.cached_tokens) for req in reqs],
            "loaded": [int(req.cached_tokens_host) for req in reqs],
            "spec_steps": [int(getattr(req, "spec_verify_ct", 0) or 0) for req in reqs],
            "free": int(whole.available_size() + tree.full_evictable_size()),
            "capacity": int(whole.size),
        }


def _sender(port_args):
    """Sends requests as the tokenizer process does, to a scheduler that hands them on."""
    import zmq
    from sglang.srt.managers.io_struct import sock_send
    from sglang.srt.utils.network import get_zmq_socket

    socket = get_zmq_socket(zmq.Context(), zmq.PUSH, port_args.scheduler_input_ipc_name, True)
    return lambda request: sock_send(socket, request)


def _named(name):
    if name is None:
        return None
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _logprobs(req):
    logprob = getattr(req, "logprob", None)
    values = None if logprob is None else logprob.output_token_logprobs_val
    return [float(value) for value in values or ()]


def _rows(state):
    return len(state) if state and isinstance(state[0], list) else 1


def main(job, out):
    with open(job) as file:
        asked = json.load(file)
    load_plugins()
    older_sglang.install(everywhere=True)  # For the extension point that the feeder uses.
    if asked["prepare"] is not None:
        _named(asked["prepare"])()
    feeder = Feeder(*build(asked["flags"], asked["stage"]), asked, out)
    feeder.scheduler.run_event_loop()
    sys.stdout.flush()
    sys.stderr.flush()
    # SGLang's threads would keep it.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
