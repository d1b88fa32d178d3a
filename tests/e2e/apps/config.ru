# The Rack application, behind puma.
require 'json'

log = File.open(ENV.fetch('APP_LOG'), 'a')
limit = ENV.fetch('APP_BODY_LIMIT', '0').to_i
note = ->(id, event) { log.syswrite("#{JSON.generate('time' => Time.now.to_f, 'id' => id, 'event' => event)}\n") }

# A body that knows when it has been handed over: puma asks for more only after it has written what was before, and for
# nothing where none is due.
Body = Struct.new(:parts, :after) do
  def each(&block)
    parts.each(&block)
    after.call
  end

  def close
    after.call if parts.empty?
  end
end

File.open("#{ENV.fetch('APP_LOG')}.workers", 'a') { |file| file.syswrite("#{Process.pid}\n") }

run(lambda do |env|
  what, *rest = env['PATH_INFO'].delete_prefix('/').split('/')
  argument, id = rest.first, rest.last
  note.call(id, 'begin')
  status, text = 200, "ok\n"
  if limit.positive? && env['CONTENT_LENGTH'].to_i > limit
    status, text = 413, "too large\n"
  else
    env['rack.input'].read
    case what
    when 'ok' then nil
    when 'slow' then sleep(argument.to_f)
    when 'exit' then Process.kill(:KILL, Process.pid)
    when 'big' then text = 'x' * argument.to_i
    else status, text = 404, "unknown\n"
    end
  end
  headers = { 'Content-Type' => 'text/plain', 'Content-Length' => text.bytesize.to_s, 'X-App' => '1' }
  [status, headers, Body.new(env['REQUEST_METHOD'] == 'HEAD' ? [] : [text], -> { note.call(id, 'end') })]
end)
