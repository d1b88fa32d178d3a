// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/configuration.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstddef>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include <arpa/inet.h>
#include <fmt/format.h>

#include "core/address.h"

namespace finrace {

namespace {

using Words = std::vector<std::string>;

constexpr std::size_t deepest_include = 16;
constexpr std::size_t most_files = 2000;
constexpr std::size_t most_bytes = 16U << 20U; ///< of all files, each as often as it is included
constexpr std::size_t most_includes = 10'000;  ///< that there are files for or not
constexpr std::size_t most_entries = 4096;     ///< that fit an upstream
constexpr std::size_t most_told = 16;          ///< of them, in a report
constexpr std::size_t deepest_block = 64;
constexpr std::size_t longest_directive = 1U << 16U;
constexpr std::size_t longest_value = 256; ///< of what a configuration defines
constexpr std::uint32_t second_ms = 1000;
constexpr std::uint32_t minute_ms = 60 * second_ms;
constexpr std::uint32_t hour_ms = 60 * minute_ms;
constexpr std::uint32_t day_ms = 24 * hour_ms;

/// All files that one reader has opened: includes may go round in a circle.
class Includes {
public:
    explicit Includes(const OpenFiles& open_files) : open_files_(open_files) {}

    template <typename Read>
    void each(const std::string& path, const Read& read)
    {
        if (depth_ == deepest_include || files_ >= most_files || ++asked_ > most_includes)
            return;
        ++depth_;
        for (const ConfigurationFile& file : open_files_(path)) {
            if (++files_ > most_files || file.text.size() > most_bytes - bytes_)
                continue;
            bytes_ += file.text.size();
            read(file);
        }
        --depth_;
    }

private:
    const OpenFiles& open_files_;
    std::size_t depth_ = 0;
    std::size_t asked_ = 0;
    std::size_t files_ = 0;
    std::size_t bytes_ = 0;
};

/// Of what anybody may have written no more than fits a line goes into a report.
std::string shortened(std::string_view text)
{
    constexpr std::size_t longest = 120;
    return text.size() <= longest ? std::string(text) : fmt::format("{}...", text.substr(0, longest));
}

/// `what`: which block or directive, where the line alone does not tell.
Present present_in(const ConfigurationFile& file, std::uint32_t line, const ProcessFacts& process, std::uint32_t ms,
                   std::string_view text, std::string_view what = {})
{
    return {.ms = ms,
            .text = shortened(text),
            .place = fmt::format("{}{}{}:{}", shortened(what), what.empty() ? "" : ", ", file.path, line),
            .pending = file.modified_s > process.started_s};
}

std::string absolute(std::string_view path, std::string_view directory)
{
    if (path.starts_with("/") || directory.empty())
        return std::string(path);
    return fmt::format("{}{}{}", directory, directory.ends_with("/") ? "" : "/", path);
}

std::string directory_of(std::string_view path)
{
    const std::size_t end = path.rfind('/');
    return end == std::string_view::npos ? std::string() : std::string(path.substr(0, std::max<std::size_t>(end, 1)));
}

bool equal_ignoring_case(std::string_view one, std::string_view other)
{
    return std::equal(one.begin(), one.end(), other.begin(), other.end(),
                      [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); });
}

std::optional<std::uint32_t> number(std::string_view text)
{
    std::uint32_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size())
        return std::nullopt;
    return value;
}

std::optional<std::uint32_t> scaled(std::uint64_t value, std::uint64_t unit_ms)
{
    if (value > std::numeric_limits<std::uint32_t>::max() / unit_ms)
        return std::nullopt;
    return static_cast<std::uint32_t>(value * unit_ms);
}

/// "75", "1h 30m", "500ms": nginx's syntax, core/ngx_parse.c, ngx_parse_time().
std::optional<std::uint32_t> nginx_time_ms(std::string_view text)
{
    static constexpr std::array<std::pair<std::string_view, std::uint32_t>, 5> units{
        {{"ms", 1}, {"s", second_ms}, {"m", minute_ms}, {"h", hour_ms}, {"d", day_ms}}};
    std::uint64_t sum = 0;
    if (text.empty())
        return std::nullopt;
    while (!text.empty()) {
        std::uint32_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error != std::errc())
            return std::nullopt;
        text.remove_prefix(static_cast<std::size_t>(end - text.data()));
        const auto* unit =
            std::find_if(units.begin(), units.end(), [&](const auto& one) { return text.starts_with(one.first); });
        if (unit == units.end() && !text.empty())
            return std::nullopt;
        sum += std::uint64_t{value} * (unit == units.end() ? second_ms : unit->second);
        text.remove_prefix(unit == units.end() ? 0 : unit->first.size());
        while (text.starts_with(" "))
            text.remove_prefix(1);
    }
    return scaled(sum, 1);
}

/// How well an address of a configuration fits an upstream: a name may stand for any address.
enum class Fit { none, by_name, by_address };

/// `host` without brackets, or with them.
Fit fit_of(std::string_view host, std::uint16_t port, const UpstreamKey& upstream)
{
    if (port != upstream.port)
        return Fit::none;
    if (host.starts_with("[") && host.ends_with("]"))
        host = host.substr(1, host.size() - 2);
    std::array<std::uint8_t, 16> address{};
    const std::string text(host);
    if (::inet_pton(AF_INET, text.c_str(), address.data()) == 1)
        return upstream.family == 4 && address == upstream.address ? Fit::by_address : Fit::none;
    if (::inet_pton(AF_INET6, text.c_str(), address.data()) == 1) {
        if (is_ipv4_mapped(address.data())) {
            ipv4_from_mapped(address.data());
            return upstream.family == 4 && address == upstream.address ? Fit::by_address : Fit::none;
        }
        return upstream.family == 6 && address == upstream.address ? Fit::by_address : Fit::none;
    }
    if (host == "localhost")
        return upstream.is_loopback() ? Fit::by_address : Fit::none;
    return host.empty() ? Fit::none : Fit::by_name;
}

/// "10.0.0.5:8000", "[::1]:8000", "app". `default_port`: 0 if it has to have one.
Fit fit_of_endpoint(std::string_view text, std::uint16_t default_port, const UpstreamKey& upstream)
{
    const std::size_t colon = text.rfind(':');
    const std::size_t bracket = text.rfind(']');
    const bool has_port = colon != std::string_view::npos && (bracket == std::string_view::npos || bracket < colon);
    if (!has_port)
        return default_port == 0 ? Fit::none : fit_of(text, default_port, upstream);
    const auto port = number(text.substr(colon + 1));
    if (!port || *port > std::numeric_limits<std::uint16_t>::max())
        return Fit::none;
    return fit_of(text.substr(0, colon), static_cast<std::uint16_t>(*port), upstream);
}

struct Candidate {
    Fit fit = Fit::none;
    Present present;
};

/// Those that fit best, each once; a few of many.
std::vector<Present> best(const std::vector<Candidate>& candidates)
{
    std::vector<Present> found;
    for (const Fit wanted : {Fit::by_address, Fit::by_name}) {
        for (const Candidate& candidate : candidates)
            if (candidate.fit == wanted)
                found.push_back(candidate.present);
        if (!found.empty())
            break;
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    if (found.size() > most_told) {
        // What End::limit_ms() looks for stays: none at all, which comes first; the longest; one that is pending.
        const auto pending =
            std::find_if(found.begin(), found.end(), [](const Present& present) { return present.pending; });
        if (pending != found.end())
            std::iter_swap(found.begin() + 1, pending);
        std::iter_swap(found.begin() + 2, found.end() - 1);
        found.resize(most_told);
        std::sort(found.begin(), found.end());
    }
    return found;
}

// ---- command lines

/// The value of a flag, the last one if it is there several times: "--flag 5" or "--flag=5".
std::optional<std::string> value_of(const Words& arguments, std::string_view flag)
{
    std::optional<std::string> value;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string_view one = arguments[i];
        if (one == flag && i + 1 < arguments.size())
            value = arguments[i + 1];
        else if (one.starts_with(flag) && one.substr(flag.size()).starts_with("="))
            value = one.substr(flag.size() + 1);
    }
    return value;
}

/// The values of a flag of one letter: "-f file" or "-ffile".
Words values_of(const Words& arguments, std::string_view flag)
{
    Words values;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string_view one = arguments[i];
        if (one == "--")
            break;
        if (one == flag && i + 1 < arguments.size())
            values.push_back(arguments[++i]);
        else if (one.starts_with(flag) && !one.starts_with("--") && one.size() > flag.size())
            values.emplace_back(one.substr(flag.size()));
    }
    return values;
}

Words split(std::string_view text)
{
    Words words;
    while (!text.empty()) {
        const std::size_t begin = text.find_first_not_of(" \t");
        if (begin == std::string_view::npos)
            break;
        text.remove_prefix(begin);
        const std::size_t end = std::min(text.find_first_of(" \t"), text.size());
        words.emplace_back(text.substr(0, end));
        text.remove_prefix(end);
    }
    return words;
}

std::string command_line_of(const ProcessFacts& process)
{
    return fmt::format("command line of process {}", process.pid);
}

/// Nothing if the flag's value is no number of seconds.
std::vector<Present> seconds_of(std::string_view flag, std::string_view value, std::string place)
{
    const auto given = number(value);
    const auto ms = given ? scaled(*given, second_ms) : std::nullopt;
    if (!ms)
        return {};
    return {{.ms = *ms, .text = fmt::format("{} {}", flag, value), .place = std::move(place)}};
}

std::vector<Present> present_on_command_line(const IdleSetting& software, const ProcessFacts& process)
{
    if (const auto value = value_of(process.arguments, software.flag))
        return seconds_of(software.flag, *value, command_line_of(process));
    if (const auto variable = process.environment.find(std::string(software.variable));
        variable != process.environment.end())
        return seconds_of(software.variable, variable->second, fmt::format("environment of process {}", process.pid));
    // A file may say otherwise (hypercorn's).
    if (value_of(process.arguments, "--config") || !values_of(process.arguments, "-c").empty())
        return {};
    return {{.ms = software.default_ms, .text = {}, .place = command_line_of(process)}};
}

// ---- gunicorn: flags, then GUNICORN_CMD_ARGS, then a file in Python (docs.gunicorn.org, Configuration Overview)

constexpr std::string_view gunicorn_variable = "GUNICORN_CMD_ARGS";

/// One of its settings, in seconds.
struct GunicornSetting {
    std::string_view flag;
    std::string_view short_flag; ///< empty if there is none
    std::string_view name;       ///< in its file
    std::uint32_t default_ms;
};

bool is_of_name(char c)
{
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_';
}

/// Where `name` stands in a line as a word of its own.
std::size_t find_name(std::string_view line, std::string_view name)
{
    for (std::size_t at = line.find(name); at != std::string_view::npos; at = line.find(name, at + 1)) {
        const std::size_t end = at + name.size();
        if ((at == 0 || !is_of_name(line[at - 1])) && (end == line.size() || !is_of_name(line[end])))
            return at;
    }
    return std::string_view::npos;
}

/// A plain assignment of a number; anything else that assigns it can't be known without running it.
std::vector<Present> gunicorn_file(const GunicornSetting& setting, const ConfigurationFile& file,
                                   const ProcessFacts& process, const std::vector<Present>& otherwise)
{
    std::vector<Present> present = otherwise;
    std::uint32_t line_number = 0;
    for (std::string_view rest = file.text; !rest.empty();) {
        const std::size_t end = std::min(rest.find('\n'), rest.size());
        std::string_view line = rest.substr(0, end);
        rest.remove_prefix(std::min(end + 1, rest.size()));
        ++line_number;
        line = line.substr(0, line.find('#'));
        const std::size_t at = find_name(line, setting.name);
        if (at == std::string_view::npos)
            continue;
        const std::size_t equals = line.find('=', at);
        const Words name = split(line.substr(0, equals == std::string_view::npos ? line.size() : equals));
        const Words value =
            equals == std::string_view::npos ? Words{} : split(line.substr(std::min(equals + 1, line.size())));
        if (at != 0 || name != Words{std::string(setting.name)} || value.size() != 1) {
            present.clear();
            continue;
        }
        const auto seconds = number(value.front().substr(0, value.front().find('\r')));
        const auto ms = seconds ? scaled(*seconds, second_ms) : std::nullopt;
        present.clear();
        if (ms)
            present.push_back(
                present_in(file, line_number, process, *ms, fmt::format("{} = {}", setting.name, *seconds)));
    }
    return present;
}

/// What gunicorn has been told, and where.
class GunicornReader {
public:
    GunicornReader(const ProcessFacts& process, const OpenFiles& open_files) : process_(process)
    {
        // Its title (setproctitle) hides the command line.
        if (process.arguments.empty() || process.arguments.front().starts_with("gunicorn: "))
            return;
        is_readable_ = true;
        if (const auto found = process.environment.find(std::string(gunicorn_variable));
            found != process.environment.end())
            variable_ = split(found->second);
        std::string name = "./gunicorn.conf.py"; // which need not be there
        bool is_named = false;
        for (const Words& words : {variable_, process.arguments}) {
            const auto value = value_of(words, "--config");
            const Words values = values_of(words, "-c");
            if (value)
                name = *value;
            if (!values.empty())
                name = values.back();
            is_named = is_named || value || !values.empty();
        }
        const bool is_module = name.starts_with("python:");
        for (const std::string_view prefix : {"file:", "./"})
            if (name.starts_with(prefix))
                name = name.substr(prefix.size());
        if (!is_module)
            files_ = open_files(absolute(name, process.directory));
        // It does not start without a file that it was told of. And what folder it started in may be gone.
        may_say_otherwise_ =
            is_module ||
            (files_.empty() && (is_named || process.directory.empty() || process.directory.ends_with(" (deleted)")));
    }

    /// Its workers are sync, which keep no connection, unless it is told otherwise.
    [[nodiscard]] bool may_keep_connections() const
    {
        const auto chooses_workers = [](const Words& words) {
            return value_of(words, "--worker-class") || value_of(words, "--threads") || !values_of(words, "-k").empty();
        };
        return chooses_workers(variable_) || chooses_workers(process_.arguments) ||
               std::any_of(files_.begin(), files_.end(), [](const ConfigurationFile& file) {
                   return file.text.find("worker_class") != std::string::npos ||
                          file.text.find("threads") != std::string::npos;
               });
    }

    [[nodiscard]] std::vector<Present> read(const GunicornSetting& setting) const
    {
        if (!is_readable_)
            return {};
        for (const auto& [words, place] :
             {std::pair(&process_.arguments, command_line_of(process_)),
              std::pair(&variable_, fmt::format("{} of process {}", gunicorn_variable, process_.pid))}) {
            if (const auto value = value_of(*words, setting.flag))
                return seconds_of(setting.flag, *value, place);
            if (const Words values = setting.short_flag.empty() ? Words{} : values_of(*words, setting.short_flag);
                !values.empty())
                return seconds_of(setting.short_flag, values.back(), place);
        }
        if (may_say_otherwise_)
            return {};
        std::vector<Present> present{{.ms = setting.default_ms, .text = {}, .place = command_line_of(process_)}};
        for (const ConfigurationFile& file : files_)
            present = gunicorn_file(setting, file, process_, present);
        return present;
    }

private:
    const ProcessFacts& process_;
    bool is_readable_ = false;
    Words variable_;
    std::vector<ConfigurationFile> files_;
    bool may_say_otherwise_ = false; ///< a file that can't be read
};

std::vector<Present> present_of_gunicorn(const IdleSetting& software, const ProcessFacts& process,
                                         const OpenFiles& open_files)
{
    const GunicornReader reader(process, open_files);
    if (!reader.may_keep_connections())
        return {};
    return reader.read(
        {.flag = software.flag, .short_flag = {}, .name = "keepalive", .default_ms = software.default_ms});
}

// ---- nginx: nginx.org/en/docs/beginners_guide.html, core/ngx_conf_file.c, ngx_conf_read_token()

class NginxReader {
public:
    NginxReader(const UpstreamKey& upstream, const IdleSetting& software, const ProcessFacts& process,
                const OpenFiles& open_files)
        : upstream_(upstream), software_(software), process_(process), includes_(open_files)
    {
    }

    std::vector<Present> read(const std::string& path)
    {
        directory_ = directory_of(path);
        includes_.each(path, [&](const ConfigurationFile& file) { take(file); });
        std::vector<Candidate> candidates;
        for (const Pool& pool : pools_)
            candidates.push_back({.fit = pool.fit, .present = pool.present});
        return best(candidates);
    }

private:
    struct Pool {
        Fit fit = Fit::none;
        Present present;
    };

    /// One file, token by token.
    void take(const ConfigurationFile& file)
    {
        const std::string_view text = file.text;
        std::uint32_t line = 1;
        std::uint32_t line_of_directive = 1;
        Words directive;
        std::size_t at = 0;
        const auto next = [&]() -> char {
            const char c = text[at++];
            line += c == '\n' ? 1 : 0;
            return c;
        };
        while (at < text.size()) {
            const char c = text[at];
            if (std::isspace(static_cast<unsigned char>(c)) != 0) {
                next();
            } else if (c == '#') {
                while (at < text.size() && text[at] != '\n')
                    next();
            } else if (c == ';') {
                next();
                end_directive(file, directive, line_of_directive);
                directive.clear();
            } else if (c == '{') {
                next();
                if (!directive.empty() && directive.front().ends_with("_by_lua_block")) {
                    for (std::size_t depth = 1; at < text.size() && depth > 0;) {
                        const char code = next();
                        depth += code == '{' ? 1 : 0;
                        depth -= code == '}' ? 1 : 0;
                    }
                } else {
                    begin_block(file, directive, line_of_directive);
                }
                directive.clear();
            } else if (c == '}') {
                next();
                directive.clear();
                end_block();
            } else {
                if (directive.empty())
                    line_of_directive = line;
                directive.push_back(word(text, at, next));
            }
        }
    }

    template <typename Next>
    static std::string word(std::string_view text, const std::size_t& at, const Next& next)
    {
        std::string word;
        if (const char quote = text[at]; quote == '"' || quote == '\'') {
            next();
            while (at < text.size() && text[at] != quote) {
                if (text[at] == '\\' && at + 1 < text.size())
                    next();
                word += next();
            }
            if (at < text.size())
                next();
            return word;
        }
        while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at])) == 0 && text[at] != ';') {
            if (text[at] == '$' && at + 1 < text.size() && text[at + 1] == '{') { // ${variable}
                word += next();
                word += next();
                continue;
            }
            if (text[at] == '{')
                break;
            if (text[at] == '}' && word.find("${") == std::string::npos)
                break;
            if (text[at] == '\\' && at + 1 < text.size())
                word += next();
            word += next();
        }
        return word;
    }

    void begin_block(const ConfigurationFile& file, const Words& directive, std::uint32_t line)
    {
        if (blocks_.size() == deepest_block) {
            ++deeper_;
            return;
        }
        blocks_.push_back(directive.empty() ? std::string() : directive.front());
        if (directive.size() == 2 && directive.front() == "upstream")
            pools_.push_back({.fit = Fit::none,
                              .present = present_in(file, line, process_, software_.default_ms, {},
                                                    fmt::format("upstream {}", directive[1]))});
    }

    void end_block()
    {
        if (deeper_ > 0) {
            --deeper_;
            return;
        }
        if (blocks_.empty())
            return;
        if (blocks_.back() == "upstream" && !pools_.empty() &&
            (pools_.back().fit == Fit::none || pools_.size() > most_entries))
            pools_.pop_back();
        blocks_.pop_back();
    }

    void end_directive(const ConfigurationFile& file, const Words& directive, std::uint32_t line)
    {
        if (directive.size() < 2)
            return;
        const std::string& name = directive.front();
        if (name == "include") {
            includes_.each(absolute(directive[1], directory_),
                           [&](const ConfigurationFile& included) { take(included); });
            return;
        }
        if (blocks_.empty() || blocks_.back() != "upstream" || pools_.empty())
            return;
        Pool& pool = pools_.back();
        constexpr std::uint16_t http_port = 80;
        if (name == "server")
            pool.fit = std::max(pool.fit, fit_of_endpoint(directive[1], http_port, upstream_));
        else if (name == "keepalive_timeout")
            if (const auto ms = nginx_time_ms(directive[1]))
                pool.present =
                    present_in(file, line, process_, *ms, fmt::format("keepalive_timeout {};", directive[1]));
    }

    const UpstreamKey& upstream_;
    const IdleSetting& software_;
    const ProcessFacts& process_;
    Includes includes_;
    std::string directory_;
    Words blocks_;
    std::size_t deeper_ = 0; ///< blocks within the deepest that are kept
    std::vector<Pool> pools_;
};

/// nginx shows its command line behind its title: "nginx: master process /usr/sbin/nginx -g daemon on;".
Words nginx_arguments(const ProcessFacts& process)
{
    Words words;
    for (const std::string& argument : process.arguments)
        for (std::string& word : split(argument))
            words.push_back(std::move(word));
    return words;
}

std::vector<Present> present_of_nginx(const IdleSetting& software, const ProcessFacts& process,
                                      const UpstreamKey& upstream, const OpenFiles& open_files)
{
    const Words arguments = nginx_arguments(process);
    const Words prefixes = values_of(arguments, "-p");
    const Words files = values_of(arguments, "-c");
    // As Debian and nginx.org's packages are built: --conf-path=/etc/nginx/nginx.conf. -p is for relative names.
    const std::string name = files.empty() ? "/etc/nginx/nginx.conf" : files.back();
    const std::string prefix = prefixes.empty() ? "/usr/share/nginx" : absolute(prefixes.back(), process.directory);
    return NginxReader(upstream, software, process, open_files).read(absolute(name, prefix));
}

// ---- HAProxy: docs.haproxy.org, configuration manual 2.1 and 2.2

/// Words of one line: spaces part them, quotes and backslashes keep them together, # ends it.
Words line_words(std::string_view line)
{
    Words words;
    std::string word;
    bool within = false;
    char quote = 0;
    for (std::size_t i = 0; i < line.size(); ++i) {
        const char c = line[i];
        if (c == '\\' && quote != '\'' && i + 1 < line.size()) {
            word += line[++i];
            within = true;
        } else if (quote != 0) {
            if (c == quote)
                quote = 0;
            else
                word += c;
        } else if (c == '"' || c == '\'') {
            quote = c;
            within = true;
        } else if (c == '#') {
            break;
        } else if (std::isspace(static_cast<unsigned char>(c)) != 0) {
            if (within)
                words.push_back(std::exchange(word, {}));
            within = false;
        } else {
            word += c;
            within = true;
        }
    }
    if (within)
        words.push_back(word);
    return words;
}

/// Calls take(line, number of its first line) for each; a backslash at its end joins the next to it.
template <typename Take>
void each_line(std::string_view text, bool joined, const Take& take)
{
    std::uint32_t number = 0;
    std::uint32_t first = 1;
    std::string whole;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find('\n'), text.size());
        std::string_view line = text.substr(0, end);
        text.remove_prefix(std::min(end + 1, text.size()));
        ++number;
        if (line.ends_with("\r"))
            line.remove_suffix(1);
        if (joined && line.ends_with("\\")) {
            whole += line.substr(0, line.size() - 1);
            continue;
        }
        whole += line;
        take(std::exchange(whole, {}), first);
        first = number + 1;
    }
    if (!whole.empty())
        take(std::move(whole), first);
}

/// HAProxy's address: "ipv4@10.0.0.5:8000".
std::string_view without_family(std::string_view address)
{
    for (const std::string_view family : {"ipv4@", "ipv6@", "ip@"})
        if (address.starts_with(family))
            return address.substr(family.size());
    return address;
}

std::vector<Present> present_of_haproxy(const ProcessFacts& process, const UpstreamKey& upstream,
                                        const OpenFiles& open_files)
{
    Words files = values_of(process.arguments, "-f");
    if (files.empty())
        files.emplace_back("/etc/haproxy/haproxy.cfg");
    std::vector<Candidate> candidates;
    Includes includes(open_files);
    const auto read = [&](const ConfigurationFile& file) {
        each_line(file.text, false, [&](const std::string& line, std::uint32_t line_number) {
            const Words words = line_words(line);
            if (words.size() < 3 || words[0] != "server" || candidates.size() == most_entries)
                return;
            if (const Fit fit = fit_of_endpoint(without_family(words[2]), 0, upstream); fit != Fit::none)
                candidates.push_back({.fit = fit,
                                      .present = present_in(file, line_number, process, 0,
                                                            fmt::format("server {} {}", words[1], words[2]))});
        });
    };
    const std::vector<std::string> directories = values_of(process.arguments, "-C");
    const std::string directory =
        directories.empty() ? process.directory : absolute(directories.back(), process.directory);
    for (const std::string& file : files)
        includes.each(absolute(file, directory), read);
    return best(candidates);
}

// ---- Apache httpd: httpd.apache.org/docs/2.4/configuring.html and mod/mod_proxy.html

class ApacheReader {
public:
    ApacheReader(const UpstreamKey& upstream, const ProcessFacts& process, const OpenFiles& open_files)
        : upstream_(upstream), process_(process), includes_(open_files)
    {
    }

    std::vector<Present> read(const std::string& path)
    {
        root_ = directory_of(path);
        includes_.each(path, [&](const ConfigurationFile& file) { take(file); });
        std::set<std::string_view> limited; // a <Proxy> block with a limit speaks for each ProxyPass to the same place
        for (const Worker& worker : workers_)
            if (worker.in_proxy_block && worker.present.ms != 0)
                limited.insert(worker.url);
        std::vector<Candidate> candidates;
        for (const Worker& worker : workers_)
            if (worker.present.ms != 0 || limited.count(worker.url) == 0)
                candidates.push_back({.fit = worker.fit, .present = worker.present});
        return best(candidates);
    }

private:
    struct Worker {
        std::string url;
        Fit fit = Fit::none;
        bool in_proxy_block = false;
        Present present;
    };

    std::string expanded(std::string_view line) const
    {
        std::string text;
        while (!line.empty()) {
            const std::size_t begin = line.find("${");
            const std::size_t end = begin == std::string_view::npos ? begin : line.find('}', begin);
            if (end == std::string_view::npos)
                return text.append(line);
            text += line.substr(0, begin);
            if (const auto found = defined_.find(std::string(line.substr(begin + 2, end - begin - 2)));
                found != defined_.end())
                text += found->second;
            else
                text += line.substr(begin, end + 1 - begin);
            line.remove_prefix(end + 1);
        }
        return text;
    }

    Fit fit_of_url(std::string_view url) const
    {
        static constexpr std::array<std::pair<std::string_view, std::uint16_t>, 4> schemes{
            {{"http://", 80}, {"https://", 443}, {"ajp://", 8009}, {"fcgi://", 8000}}};
        for (const auto& [scheme, port] : schemes)
            if (url.starts_with(scheme)) {
                const std::string_view rest = url.substr(scheme.size());
                return fit_of_endpoint(rest.substr(0, rest.find('/')), port, upstream_);
            }
        return Fit::none;
    }

    void take(const ConfigurationFile& file)
    {
        each_line(file.text, true, [&](const std::string& line, std::uint32_t line_number) {
            if (line.size() > longest_directive) // nobody's, and what it expands to may be longer still
                return;
            const std::string whole = expanded(line);
            if (const std::size_t first = whole.find_first_not_of(" \t");
                first == std::string::npos || whole[first] == '#')
                return;
            take_line(file, line_words(whole), line_number);
        });
    }

    void take_line(const ConfigurationFile& file, Words words, std::uint32_t line)
    {
        if (words.empty())
            return;
        const auto is = [&](std::string_view name) { return equal_ignoring_case(words.front(), name); };
        if (is("</Proxy>"))
            proxy_block_.clear();
        if (words.size() < 2)
            return;
        if (words.front().starts_with("<") && words.back().ends_with(">"))
            words.back().pop_back();
        if (is("ServerRoot")) {
            root_ = words[1];
        } else if (is("Define")) {
            if (words.size() == 3 && defined_.size() < most_files && words[2].size() <= longest_value)
                defined_[words[1]] = words[2];
        } else if (is("Include") || is("IncludeOptional")) {
            includes_.each(absolute(words[1], root_), [&](const ConfigurationFile& included) { take(included); });
        } else if (is("<Proxy")) {
            proxy_block_ = words[1];
        } else if (is("ProxyPass") || is("ProxyPassMatch") || is("BalancerMember") || is("ProxySet")) {
            const auto url = std::find_if(words.begin() + 1, words.end(), [](const std::string& word) {
                return word.find("://") != std::string::npos;
            });
            add(file, words, url != words.end() ? *url : is("ProxySet") ? proxy_block_ : std::string(), line);
        }
    }

    void add(const ConfigurationFile& file, const Words& words, const std::string& url, std::uint32_t line)
    {
        const Fit fit = fit_of_url(url);
        if (fit == Fit::none || workers_.size() == most_entries)
            return;
        constexpr std::string_view ttl = "ttl=";
        Worker worker{.url = url.ends_with("/") ? url.substr(0, url.size() - 1) : url,
                      .fit = fit,
                      .in_proxy_block = equal_ignoring_case(words.front(), "ProxySet"),
                      .present = present_in(file, line, process_, 0, {}, fmt::format("{} {}", words.front(), url))};
        for (const std::string& word : words)
            if (word.size() > ttl.size() && equal_ignoring_case(std::string_view(word).substr(0, ttl.size()), ttl))
                if (const auto value = number(std::string_view(word).substr(ttl.size())))
                    if (const auto ms = scaled(*value, second_ms)) {
                        worker.present.ms = *ms;
                        worker.present.text = word;
                    }
        workers_.push_back(std::move(worker));
    }

    const UpstreamKey& upstream_;
    const ProcessFacts& process_;
    Includes includes_;
    std::string root_;
    std::string proxy_block_;
    std::map<std::string, std::string> defined_;
    std::vector<Worker> workers_;
};

std::vector<Present> present_of_apache(const ProcessFacts& process, const UpstreamKey& upstream,
                                       const OpenFiles& open_files)
{
    const bool debian = process.name.starts_with("apache2");
    const Words roots = values_of(process.arguments, "-d");
    const Words files = values_of(process.arguments, "-f");
    const std::string root = !roots.empty() ? roots.back() : debian ? "/etc/apache2" : "/etc/httpd";
    const std::string name = !files.empty() ? files.back() : debian ? "apache2.conf" : "conf/httpd.conf";
    return ApacheReader(upstream, process, open_files).read(absolute(name, root));
}

} // namespace

std::vector<std::string_view> deciding_variables()
{
    std::vector<std::string_view> names{gunicorn_variable};
    for (const IdleSetting& server : server_settings())
        if (!server.variable.empty())
            names.push_back(server.variable);
    return names;
}

std::vector<Present> present_of_proxy(const IdleSetting& software, const ProcessFacts& process,
                                      const UpstreamKey& upstream, const OpenFiles& open_files)
{
    switch (software.configuration) {
    case Configuration::nginx:
        return present_of_nginx(software, process, upstream, open_files);
    case Configuration::haproxy:
        return present_of_haproxy(process, upstream, open_files);
    case Configuration::apache:
        return present_of_apache(process, upstream, open_files);
    case Configuration::command_line:
    case Configuration::gunicorn:
    case Configuration::unreadable:
        break;
    }
    return {};
}

std::vector<Present> present_of_server(const IdleSetting& software, const ProcessFacts& process,
                                       const OpenFiles& open_files)
{
    switch (software.configuration) {
    case Configuration::command_line:
        return present_on_command_line(software, process);
    case Configuration::gunicorn:
        return present_of_gunicorn(software, process, open_files);
    case Configuration::nginx:
    case Configuration::haproxy:
    case Configuration::apache:
    case Configuration::unreadable:
        break;
    }
    return {};
}

std::string recycling_of_server(const IdleSetting& software, const ProcessFacts& process)
{
    const auto value = software.recycling.empty() ? std::nullopt : value_of(process.arguments, software.recycling);
    return value && number(*value).value_or(0) != 0
               ? fmt::format("{} {}: {}", software.recycling, *value, command_line_of(process))
               : std::string();
}

std::vector<Present> worker_limit_of_server(const IdleSetting& software, const ProcessFacts& process,
                                            const OpenFiles& open_files)
{
    if (software.configuration != Configuration::gunicorn)
        return {};
    return GunicornReader(process, open_files)
        .read({.flag = worker_limit_flag,
               .short_flag = worker_limit_short_flag,
               .name = worker_limit_name,
               .default_ms = worker_limit_default_ms});
}

} // namespace finrace
