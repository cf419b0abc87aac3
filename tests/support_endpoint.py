"""An OpenAI-compatible endpoint of the tests' own, over HTTP."""

import contextlib
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def endpoint(reply: Callable):
    """Serve /v1/chat/completions; yield (url, requests so far).

    reply(body): the text of the answer, of /v1/embeddings its JSON; or a list of its tokens, each
    (text, {likely text: probability}); or a status code; or (status code, message, headers).
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
            text, is_raw = reply(body), self.path.endswith("/embeddings")
            tokens, text = (text, "".join(one for one, _ in text)) if isinstance(text, list) else ([], text)
            status, message, headers = (200, "", {}) if isinstance(text, str) else (text, "no", {})
            if isinstance(text, tuple):
                status, message, headers = text
            answer = {"error": {"message": message}} if status != 200 else json.loads(text) if is_raw else {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }  # fmt: skip
            if tokens:
                answer["choices"][0]["logprobs"] = {"content": [
                    {"token": one, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in likely.items()]}
                    for one, likely in tokens
                ]}  # fmt: skip
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
