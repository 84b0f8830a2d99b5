// The functions of PAC scripts, as Netscape described them and Microsoft extended them.
//
// `native` is what is done outside: names, addresses, patterns. `now` gives the time.
(function (native, now) {
    "use strict";

    const DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
    const MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];

    const text = (value) => String(value);
    const isV4 = (address) => !address.includes(":");

    // The addresses of a name, or the address itself.
    const addresses = (host) => native.resolve(text(host));
    const firstV4 = (list) => {
        const found = list.find(isV4);
        return found === undefined ? null : found;
    };

    // Takes a last "GMT" off, and gives the time by it or by the clock on the wall.
    const moment = (words) => {
        const gmt = words.length > 0 && text(words[words.length - 1]).toUpperCase() === "GMT";
        if (gmt) {
            words.pop();
        }
        const time = now();
        const part = (name) => (gmt ? time["getUTC" + name]() : time["get" + name]());
        return {
            year: part("FullYear"), month: part("Month"), day: part("Date"), weekday: part("Day"),
            seconds: (part("Hours") * 60 + part("Minutes")) * 60 + part("Seconds"),
        };
    };

    // Whether a value lies between two, both of them included. Where the first is the later one, the range goes over the end.
    const within = (from, value, to) => (from <= to ? from <= value && value <= to : value >= from || value <= to);

    const numberOf = (names, word) => names.indexOf(text(word).toUpperCase());

    // A day, a month or a year, by what it looks like.
    const datePart = (word) => {
        const month = numberOf(MONTHS, word);
        if (month >= 0) {
            return ["month", month];
        }
        const number = Number(word);
        if (!Number.isInteger(number) || number < 1) {
            return ["nothing", 0];
        }
        return [number <= 31 ? "day" : "year", number];
    };

    // One number for a date, of the parts that matter.
    const dateNumber = (date, parts) => {
        const part = (name) => (parts.includes(name) ? date[name] : 0);
        return (part("year") * 12 + part("month")) * 32 + part("day");
    };

    const functions = {
        isPlainHostName: (host) => !/[.:]/.test(text(host)),
        dnsDomainIs: (host, domain) => text(host).toLowerCase().endsWith(text(domain).toLowerCase()),
        localHostOrDomainIs: (host, name) => {
            const [plain, full] = [text(host).toLowerCase(), text(name).toLowerCase()];
            return plain === full || (!plain.includes(".") && full.startsWith(plain + "."));
        },
        isResolvable: (host) => firstV4(addresses(host)) !== null,
        isInNet: (host, network, mask) => {
            const address = firstV4(addresses(host));
            return address !== null && native.isInNet(address, text(network), text(mask));
        },
        dnsResolve: (host) => firstV4(addresses(host)),
        convert_addr: (address) => {
            const bytes = text(address).split(".").map(Number);
            return bytes.length === 4 ? (bytes[0] << 24) | (bytes[1] << 16) | (bytes[2] << 8) | bytes[3] : 0;
        },
        myIpAddress: () => {
            const own = native.own();
            const address = firstV4(own);
            return address === null ? own[0] || "127.0.0.1" : address;
        },
        dnsDomainLevels: (host) => text(host).split(".").length - 1,
        shExpMatch: (value, pattern) => native.matches(text(value), text(pattern)),

        weekdayRange: (...words) => {
            const { weekday } = moment(words);
            const days = words.map((word) => numberOf(DAYS, word));
            if (days.length < 1 || days.length > 2 || days.includes(-1)) {
                return false;
            }
            return within(days[0], weekday, days[days.length - 1]);
        },
        dateRange: (...words) => {
            const today = moment(words);
            const parts = words.map(datePart);
            const kinds = parts.map(([kind]) => kind);
            const half = kinds.length / 2;
            const isRange = kinds.slice(0, half).join() === kinds.slice(half).join();
            const named = isRange ? kinds.slice(0, half) : kinds;
            if (named.length < 1 || new Set(named).size < named.length || named.includes("nothing")) {
                return false;
            }
            const number = (list) => dateNumber(Object.fromEntries(list), named);
            const value = dateNumber(today, named);
            if (!isRange) {
                return number(parts) === value;
            }
            const [from, to] = [number(parts.slice(0, half)), number(parts.slice(half))];
            // Years do not come round again.
            return named.includes("year") ? from <= value && value <= to : within(from, value, to);
        },
        timeRange: (...words) => {
            const { seconds } = moment(words);
            const numbers = words.map(Number);
            const isFit = (number) => Number.isInteger(number) && number >= 0 && number < 60;
            if (![1, 2, 4, 6].includes(numbers.length) || !numbers.every(isFit)) {
                return false;
            }
            const inDay = ([hours, minutes = 0, rest = 0]) => (hours * 60 + minutes) * 60 + rest;
            if (numbers.length === 1) {
                return Math.floor(seconds / 3600) === numbers[0];
            }
            const half = numbers.length / 2;
            return within(inDay(numbers.slice(0, half)), seconds, inDay(numbers.slice(half)));
        },
        alert: () => undefined,

        isResolvableEx: (host) => addresses(host).length > 0,
        isInNetEx: (address, prefix) => native.isInPrefix(text(address), text(prefix)),
        dnsResolveEx: (host) => addresses(host).join(";"),
        myIpAddressEx: () => native.own().join(";"),
        sortIpAddressList: (list) => native.sort(text(list)),
        getClientVersion: () => "1.0",
    };
    Object.assign(globalThis, functions);
})
