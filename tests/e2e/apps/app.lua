-- The application in httpd itself: a handler of mod_lua.
local log = os.getenv("APP_LOG")

local function note(r, id, event)
    local file = assert(io.open(log, "a"))
    file:write(string.format('{"time": %.6f, "id": "%s", "event": "%s"}\n', r:clock() / 1e6, id, event))
    file:close()
end

local function answer(r, status, body)
    r.status = status
    r.headers_out["Content-Length"] = tostring(#body)
    r.content_type = "text/plain"
    r:write(body)
    r:flush()
end

function handle(r)
    local what, rest = r.uri:match("^/(%w+)/(.*)$")
    local argument, id = (rest or ""):match("^([^/]*)/([^/]*)$")
    id = id or rest or ""
    note(r, id, "begin")
    local length = tonumber(r.headers_in["Content-Length"] or "0")
    if not r:requestbody() and length > 0 then
        note(r, id, "end")
        return 413 -- httpd's own page
    end
    if what == "ok" then
        answer(r, 200, "ok\n")
    elseif what == "slow" then
        r.usleep(math.floor(tonumber(argument) * 1e6))
        answer(r, 200, "ok\n")
    elseif what == "big" then
        answer(r, 200, string.rep("x", tonumber(argument)))
    elseif what == "exit" then
        os.execute("kill -KILL $PPID")
    else
        answer(r, 404, "unknown\n")
    end
    note(r, id, "end")
    return apache2.OK
end
