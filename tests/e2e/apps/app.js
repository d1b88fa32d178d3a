// Node's http server with its application; more than one worker: its cluster module, which replaces those that die.
'use strict';
const cluster = require('cluster');
const fs = require('fs');
const http = require('http');

const { APP_LOG, APP_ADDRESS, APP_PORT, APP_KEEP_ALIVE, APP_MAX_REQUESTS, APP_BODY_LIMIT, APP_WORKERS } = process.env;
const workers = Number(APP_WORKERS);

function serve() {
    const log = fs.openSync(APP_LOG, 'a');
    const note = (id, event) =>
        fs.writeSync(log, JSON.stringify({ time: (performance.timeOrigin + performance.now()) / 1000, id, event }) + '\n');
    const limit = Number(APP_BODY_LIMIT);

    const server = http.createServer((request, response) => {
        const [what, ...rest] = request.url.split('/').slice(1);
        const id = rest[rest.length - 1];
        const argument = rest[0];
        note(id, 'begin');

        const answer = (status, body, then) => {
            response.writeHead(status, { 'Content-Type': 'text/plain', 'Content-Length': body.length, 'X-App': '1' });
            response.end(request.method === 'HEAD' ? undefined : body, () => {
                note(id, 'end');
                if (then) then();
            });
        };
        const work = {
            ok: () => answer(200, 'ok\n'),
            slow: () => setTimeout(() => answer(200, 'ok\n'), Number(argument) * 1000),
            big: () => answer(200, Buffer.alloc(Number(argument), 'x')),
            exit: () => process.kill(process.pid, 'SIGKILL'),
            close: () => {
                const close = () => request.socket.destroySoon();  // once what was written before is with the kernel
                if (argument === 'after') {
                    answer(200, 'ok\n', close);
                    return;
                }
                if (argument === 'between') {
                    response.writeHead(200, { 'Content-Length': 3, 'X-App': '1' });
                    response.flushHeaders();
                }
                close();
            },
        };
        if (limit && Number(request.headers['content-length'] || 0) > limit) {
            answer(413, 'too large\n');
            return;
        }
        request.resume();
        request.on('end', work[what] || (() => answer(404, 'unknown\n')));
    });
    if (APP_KEEP_ALIVE) server.keepAliveTimeout = Number(APP_KEEP_ALIVE) * 1000;
    if (APP_MAX_REQUESTS) server.maxRequestsPerSocket = Number(APP_MAX_REQUESTS);
    server.listen(Number(APP_PORT), APP_ADDRESS, () => fs.appendFileSync(APP_LOG + '.workers', process.pid + '\n'));
    process.on('SIGTERM', () => {
        server.close(() => process.exit(0));
        server.closeIdleConnections();
    });
}

if (workers > 1 && cluster.isPrimary) {
    for (let number = 0; number < workers; number++) cluster.fork();
    cluster.on('exit', () => cluster.fork());
} else {
    serve();
}
