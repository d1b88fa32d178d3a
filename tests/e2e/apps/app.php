<?php
// The application in php-fpm, behind nginx.
function note(string $id, string $event): void
{
    $line = json_encode(['time' => microtime(true), 'id' => $id, 'event' => $event]);
    file_put_contents($_SERVER['APP_LOG'], $line . "\n", FILE_APPEND);
}

function answer(int $status, string $body): void
{
    http_response_code($status);
    header('Content-Type: text/plain');
    header('Content-Length: ' . strlen($body));
    if ($_SERVER['REQUEST_METHOD'] !== 'HEAD') {
        echo $body;
    }
    fastcgi_finish_request();
}

$path = explode('/', trim(parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH), '/'));
$id = end($path);
note($id, 'begin');
$input = fopen('php://input', 'rb');
while (!feof($input)) {
    fread($input, 65536);
}
switch ($path[0]) {
    case 'ok':
        answer(200, "ok\n");
        break;
    case 'slow':
        usleep((int) ($path[1] * 1e6));
        answer(200, "ok\n");
        break;
    case 'exit':
        posix_kill(getmypid(), 9);
        break;
    case 'big':
        answer(200, str_repeat('x', (int) $path[1]));
        break;
    default:
        answer(404, "unknown\n");
}
note($id, 'end');
