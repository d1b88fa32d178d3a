-- The last word of a run of wrk, for a program to read. No other hook: those would cost instructions for each request.
done = function(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format('RESULT {"requests": %d, "microseconds": %d, "errors": %d}\n', summary.requests, summary.duration,
                           errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
